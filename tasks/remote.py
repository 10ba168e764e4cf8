"""Object stores, reached through flytekit's file access: look, download, upload."""

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from flytekit import FlyteContext, FlyteContextManager
from flytekit.core.context_manager import ExecutionState
from flytekit.core.data_persistence import FileAccessProvider, get_fsspec_storage_options, get_protocol
from flytekit.exceptions.system import FlyteDownloadDataException, FlyteUploadDataException
from fsspec.core import has_magic

from lib.core.errors import InfraError, UserError
from lib.core.manifest import digest_of
from lib.core.stamps import content_stamp
from lib.core.transient import is_transient

LISTED = "listing:"
"""Begins a fingerprint."""


def is_remote(uri: str) -> bool:
    """Whether an address is one of an object store and not a path."""
    return bool(FileAccessProvider.is_remote(uri))


def fetch(uri: str, target: Path, *, left_behind: tuple[str, ...] = ()) -> Path:
    """Download a file or a folder to `target`.

    Args:
        left_behind: endings of files of the folder that aren't wanted.
    Raises:
        UserError: there is nothing at the address.
        InfraError: the download broke off.
    """
    access = FlyteContextManager.current_context().file_access
    remote = access.get_filesystem_for_path(uri)
    if not remote.exists(uri):
        raise UserError(f"{uri}: nothing there; check the address and the right to read it")
    if not left_behind:
        try:
            access.get_data(uri, str(target), is_multipart=remote.isdir(uri))
        except FlyteDownloadDataException as error:
            raise InfraError(f"{uri}: the download broke off: {error}") from error
        return target
    root = str(remote._strip_protocol(uri)).rstrip("/")
    for path in remote.find(uri):
        if not path.endswith(left_behind):
            file = target / posixpath.relpath(path, root)
            file.parent.mkdir(parents=True, exist_ok=True)
            remote.get_file(path, str(file))
    return target


def fingerprint(uri: str) -> str | None:
    """Stands for the content at a remote address or glob: names, sizes and `content_stamp`s of its objects. None for a path.

    Raises:
        UserError: there is nothing at the address.
    """
    if not is_remote(uri):
        return None
    address = uri.partition("?")[0] if uri.startswith("hf://") else uri
    remote = FlyteContextManager.current_context().file_access.get_filesystem_for_path(address)
    remote.invalidate_cache()
    found = (remote.glob if has_magic(address) else remote.find)(address, detail=True)
    entries = {path: info for path, info in found.items() if info["type"] == "file"}
    if not entries:
        raise UserError(f"{uri}: nothing there; check the address and the right to read it")
    root = posixpath.commonpath([posixpath.dirname(path) for path in entries])
    listing = [
        [posixpath.relpath(path, root), info["size"], content_stamp(remote, info)] for path, info in sorted(entries.items())
    ]
    return f"{LISTED}{digest_of(listing)}"


@contextmanager
def converting() -> Iterator[None]:
    """Around what turns a task's value into a literal: Flyte retries there only what its own uploads raise."""
    try:
        yield
    except Exception as error:
        state = FlyteContextManager.current_context().execution_state
        in_a_container = state is not None and state.mode == ExecutionState.Mode.TASK_EXECUTION
        if in_a_container and is_transient(error):
            raise FlyteUploadDataException(f"{type(error).__name__}: {error}") from error
        raise


def share_credentials(uri: str) -> None:
    """Let what reads an address through fsspec alone do so with the options that flytekit has for its kind of store."""
    protocol = get_protocol(uri)
    options = get_fsspec_storage_options(protocol, FlyteContextManager.current_context().file_access.data_config)
    fsspec.config.conf.setdefault(protocol, {}).update(options)


def upload(ctx: FlyteContext, path: Path) -> str:
    """Put a file or a folder under the outputs of this execution; returns its address."""
    target = ctx.file_access.join(ctx.file_access.get_random_remote_directory(), path.name)
    return str(ctx.file_access.put_data(str(path), target, is_multipart=path.is_dir()))
