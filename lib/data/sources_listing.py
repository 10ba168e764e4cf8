"""What files a source is made of: a path, a folder, a glob or an address of an object store, as a list of files to read."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from lib.core.errors import DataError, InfraError
from lib.core.manifest import MANIFEST_NAME, digest_of, file_sha256
from lib.core.stamps import CHECKSUMS, content_stamp
from lib.core.transient import is_transient

FORMATS = {".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
"""botocore's, which is there only where S3 is read."""
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, as it was when the source was opened."""

    name: str
    """Relative to the source, with forward slashes."""
    filesystem: AbstractFileSystem
    opened_by: str
    """The address that the file system was found by."""
    path: str
    size_bytes: int
    stamp: str
    """Sha256 of a file here, or of a remote one whose store has no checksum; else that checksum."""
    guard: tuple[str, ...]
    """What a file that was touched since has otherwise; of a file here only good on this machine."""
    format: str
    compression: str | None

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def range(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop` or the end of the file."""
        with reading(self.name):
            found: bytes = self.filesystem.cat_file(self.path, start=start, end=min(stop, self.size_bytes))
        if len(found) != min(stop, self.size_bytes) - start:
            raise DataError(f"{self.name}: ends before byte {stop}; it was cut since it was opened, copy it again")
        return found

    def open(self, block_bytes: int) -> Any:
        """The file as a seekable stream that fetches `block_bytes` at a time from a store."""
        with reading(self.name):
            if self.is_local:
                return self.filesystem.open(self.path, "rb")
            return self.filesystem.open(self.path, "rb", block_size=block_bytes, cache_type="readahead")

    def check_unaltered(self) -> None:
        """Raises DataError: the file is gone or another than when the source was opened."""
        with reading(self.name):
            info = self.filesystem.info(self.path)
        if _guard(info) != self.guard:
            raise DataError(f"{self.name}: was altered since it was opened; leave data in place while it is read")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what a store or a disk raises into our errors: what can't be there is the user's, the rest the machine's."""
    try:
        yield
    except (DataError, InfraError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: is gone; leave data in place while it is read") from error
    except PermissionError as error:
        raise DataError(f"{name}: can't be read: permission denied; grant the right to read it") from error
    except Exception as error:  # stores have exceptions of their own, with no common root
        raise InfraError(f"{name}: could not be read: {type(error).__name__}: {error}") from error


def list_files(where: str | Path) -> list[SourceFile]:
    """Each data file, in order of name. Hidden files are left out; of a saved `datasets` folder its data files are taken.

    Raises:
        DataError: nothing there, no right to look, a file of another kind, or none at all.
        InfraError: the store did not answer.
    """
    filesystem, path = filesystem_at(str(where))
    with _listing(str(where), filesystem):
        root, found = _find(filesystem, path)
        found = _saved_dataset(filesystem, root, found)
        files = [_source_file(filesystem, str(where), name, info) for name, info in sorted(found.items())]
    if not files:
        raise DataError(f"{where}: holds no file of rows ({', '.join(SUFFIXES)})")
    return files


def files_at(addresses: dict[str, str]) -> list[SourceFile]:
    """The files at addresses that are known, by the names to be used for them, in that order.

    Raises:
        DataError: as `list_files`.
    """
    files = []
    for name, where in addresses.items():
        filesystem, path = filesystem_at(where)
        with _listing(where, filesystem):
            files.append(_source_file(filesystem, where, name, filesystem.info(path)))
    return files


def listing_digest(files: list[SourceFile]) -> str:
    """Sha256 over names, sizes and stamps."""
    return digest_of([[file.name, file.size_bytes, file.stamp] for file in files])


def filesystem_at(where: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the path in it.

    Raises:
        DataError: no such kind of address.
    """
    if "://" not in where and "::" not in where:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(where))
    try:
        # A listing kept in memory would hide that a file was altered.
        filesystem, path = url_to_fs(where, use_listings_cache=False)
    except ImportError as error:
        raise DataError(f"{where}: {error}; install the package for this kind of address") from error
    except Exception as error:  # a malformed address raises whatever its file system likes
        raise DataError(f"{where}: not an address that can be opened: {error}") from error
    return filesystem, path


@contextmanager
def _listing(where: str, filesystem: AbstractFileSystem) -> Iterator[None]:
    """Turns what a listing raises into our errors: a mistake in the address is the user's, a silent store the machine's."""
    try:
        yield
    except (DataError, InfraError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{where}: no such file or folder; pass a file, a folder, a glob or an address") from error
    except Exception as error:  # stores have exceptions of their own, with no common root
        reason = f"{where}: can't be listed: {type(error).__name__}: {error}; check address and rights"
        wrong = isinstance(error, PermissionError | ValueError | KeyError) or type(error).__name__ in _NO_CREDENTIALS
        if wrong or (isinstance(filesystem, LocalFileSystem) and not is_transient(error)):
            raise DataError(reason) from error
        raise InfraError(reason) from error


def _find(filesystem: AbstractFileSystem, path: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The folder that names are relative to, and name -> listing entry."""
    local = isinstance(filesystem, LocalFileSystem)
    if _MAGIC.search(path) and not (local and os.path.lexists(path)):
        return _find_glob(filesystem, path, local)
    info = filesystem.info(path)
    if info["type"] == "file":
        return os.path.dirname(path), {PurePosixPath(path).name: info}
    if info["type"] != "directory":
        raise DataError(f"{path}: neither a file nor a folder")
    entries = _walk(path, None) if local else filesystem.find(path, detail=True)
    return path, {name: info for name, info in _relative(path, entries).items() if not _is_hidden(name)}


def _find_glob(filesystem: AbstractFileSystem, path: str, local: bool) -> tuple[str, dict[str, dict[str, Any]]]:
    parts = path.split("/")
    fixed = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
    root = "/".join(parts[:fixed])
    if local:
        pattern = re.compile(glob_translate(path))
        depth = None if "**" in path else len(parts) - fixed
        entries = {name: info for name, info in _walk(root or "/", depth).items() if pattern.fullmatch(name)}
    else:
        entries = {name: info for name, info in filesystem.glob(path, detail=True).items() if info["type"] == "file"}
    found = {name: info for name, info in _relative(root, entries).items() if not _is_hidden(name)}
    if not found:
        raise DataError(f"{path}: no file matches")
    return root, found


def _walk(root: str, depth: int | None) -> dict[str, dict[str, Any]]:
    """path -> info of all plain files but hidden ones; links to folders are refused, as they may lead round in a circle."""
    local, found = LocalFileSystem(), {}

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: can't be listed: {error.strerror}; grant the right to read it")

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        level = len(Path(folder).relative_to(root).parts) + 1
        if depth is not None and level >= depth:
            folders.clear()
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                raise DataError(f"{folder}/{name}: a link to a folder is not followed; pass that folder itself, or a glob")
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
            if not os.path.exists(path):
                raise DataError(f"{path}: a link to nothing; remove it")
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise DataError(f"{path}: not a plain file; remove it")
            found[path] = local.info(path)
    return found


def _relative(root: str, entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    prefix = root.rstrip("/") + "/" if root else ""
    return {path.removeprefix(prefix): info for path, info in entries.items()}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _saved_dataset(filesystem: AbstractFileSystem, root: str, found: dict[str, Any]) -> dict[str, Any]:
    """The data files of a folder written by `datasets.save_to_disk`; any other listing as it is."""
    if MANIFEST_NAME in found and any(name.startswith("rows-") for name in found):
        raise DataError(f"{root}: rows that were ingested already; pass this data set to what takes one, or its source here")
    if "dataset_dict.json" in found:
        names = json.loads(filesystem.cat_file(f"{root}/dataset_dict.json"))["splits"]
        raise DataError(f"{root}: a saved data set with splits {', '.join(names)}; pass the folder of one of them")
    if not {"state.json", "dataset_info.json"} <= found.keys():
        return found
    names = [entry["filename"] for entry in json.loads(filesystem.cat_file(f"{root}/state.json"))["_data_files"]]
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{root}/{missing[0]}: is missing from the saved data set; copy the folder again")
    return {name: found[name] for name in names}


def _source_file(filesystem: AbstractFileSystem, opened_by: str, name: str, info: dict[str, Any]) -> SourceFile:
    if not name.isprintable():
        raise DataError(f"{name!a}: a file name with characters that can't be printed; rename it")
    suffixes = PurePosixPath(name).suffixes
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    suffix = "".join(suffixes[-2:] if compression else suffixes[-1:])
    if suffix not in SUFFIXES:
        raise DataError(
            f"{info['name']}: a {suffix or 'nameless'} file; rows are read from {', '.join(SUFFIXES)} files only; "
            "remove it, or pass a glob such as **/*.jsonl"
        )
    size_bytes = info.get("size")
    if size_bytes is None:
        raise DataError(f"{info['name']}: the store doesn't say how large it is, so it can't be read in parts; copy it")
    path = info["name"]
    with reading(name):
        local = isinstance(filesystem, LocalFileSystem)
        stamp = file_sha256(Path(path)) if local else content_stamp(filesystem, info)
    format_ = FORMATS[suffixes[-2] if compression else suffixes[-1]]
    return SourceFile(name, filesystem, opened_by, path, size_bytes, stamp, _guard(info), format_, compression)


def _guard(info: dict[str, Any]) -> tuple[str, ...]:
    values = (info[key] for key in ("size", "mtime", "created", "LastModified", *CHECKSUMS) if key in info)
    # Stores may tell the same time as a date in one call and as seconds in another.
    return tuple(str(value.timestamp() if isinstance(value, datetime) else value) for value in values)
