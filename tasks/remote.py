"""Object stores, reached through flytekit's file access: look, download, upload."""

from pathlib import Path

from flytekit import FlyteContext, FlyteContextManager
from flytekit.core.data_persistence import FileAccessProvider

from lib.core.errors import UserError
from lib.core.manifest import digest_of


def is_remote(uri: str) -> bool:
    """Whether an address is one of an object store and not a path."""
    return bool(FileAccessProvider.is_remote(uri))


def fetch(uri: str, target: Path) -> Path:
    """Download a file or a folder to `target`.

    Raises:
        UserError: there is nothing at the address.
    """
    access = FlyteContextManager.current_context().file_access
    remote = access.get_filesystem_for_path(uri)
    if not remote.exists(uri):
        raise UserError(f"{uri}: nothing there; check the address and the right to read it")
    access.get_data(uri, str(target), is_multipart=remote.isdir(uri))
    return target


def fingerprint(uri: str) -> str | None:
    """Stands for the content at a remote address: the checksums in the store's listing. None for a path.

    Raises:
        UserError: there is nothing at the address.
    """
    if not is_remote(uri):
        return None
    remote = FlyteContextManager.current_context().file_access.get_filesystem_for_path(uri)
    if not remote.exists(uri):
        raise UserError(f"{uri}: nothing there; check the address and the right to read it")
    return digest_of({path: str(remote.checksum(path)) for path in sorted(remote.find(uri))})


def upload(ctx: FlyteContext, path: Path) -> str:
    """Put a file or a folder under the outputs of this execution; returns its address."""
    target = ctx.file_access.join(ctx.file_access.get_random_remote_directory(), path.name)
    return str(ctx.file_access.put_data(str(path), target, is_multipart=path.is_dir()))
