"""Folders that are written whole or not at all, and read only after they prove what they hold.

Write: a staging folder beside the target, each file fsynced, the manifest last, then one rename and an fsync of the
parent. A crash at any moment leaves either no artifact or a whole one; staging leftovers are never discovered.
"""

import hashlib
import mmap
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lib.core.errors import ArtifactCorruptError, UserError
from lib.core.manifest import MANIFEST_NAME, FileEntry, Json, Manifest, file_sha256
from lib.core.versions import library_versions

STAGING_PREFIX = ".staging-"
_CHUNK_BYTES = 32 * 1024**2
_WRITE_BYTES = 1 << 20
"""Of a file at a time. Larger writes took up to ten times as long now and then, in the kernel."""


@dataclass
class Staged:
    """An artifact being written: fill `path` with files and set the fields; the manifest is made from them."""

    path: Path
    counts: dict[str, int] = field(default_factory=dict)
    meta: Json = field(default_factory=dict)
    lineage: dict[str, str] = field(default_factory=dict)
    info: Json = field(default_factory=dict)
    known_sha256: dict[str, str] = field(default_factory=dict)
    """Relative path -> sha256 of files whose writer has hashed them already; the others are hashed at publishing."""


@contextmanager
def stage_artifact(target: Path, kind: str) -> Iterator[Staged]:
    """Write an artifact to `target`, which must not exist; published when the block ends without an exception.

    Raises:
        FileExistsError: `target` is there already.
        OSError: the disk failed or is full; nothing is left behind at `target`.
    """
    if target.exists():
        raise FileExistsError(f"{target}: an artifact is there already; remove it or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{target.name}-", dir=target.parent))
    staged = Staged(staging)
    try:
        yield staged
        publish(staged, target, kind)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def publish(staged: Staged, target: Path, kind: str) -> Manifest:
    """Turn a filled staging folder into the artifact at `target`: fsync all, write the manifest, rename, fsync."""
    manifest = Manifest(
        kind=kind,
        files=_entries(staged.path, staged.known_sha256),
        counts=dict(sorted(staged.counts.items())),
        meta=staged.meta,
        lineage=staged.lineage,
        versions=library_versions(),
        info=staged.info,
    )
    for entry in manifest.files:
        fsync_path(staged.path / entry.path)
    write_durably(staged.path / MANIFEST_NAME, manifest.to_json())
    for folder in sorted({(staged.path / entry.path).parent for entry in manifest.files} | {staged.path}, reverse=True):
        fsync_path(folder)
    staged.path.chmod(0o755)
    os.rename(staged.path, target)
    fsync_path(target.parent)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises ArtifactCorruptError when there is no readable manifest; doesn't look at the files (see `verify`)."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactCorruptError(f"{folder}: no {MANIFEST_NAME}, so not an artifact of Postflyte (or half a copy)")
    return Manifest.from_json(path.read_text(encoding="utf-8", errors="replace"), where=str(path))


def verify(folder: Path, kind: str | None = None) -> Manifest:
    """Check every file's presence, size and sha256 against the manifest.

    Raises:
        UserError: it is whole, but of another kind.
        ArtifactCorruptError: names the first file that is missing, altered or not in the manifest.
    """
    manifest = read_manifest(folder)
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{folder}: holds a {manifest.kind!r}, expected a {kind!r}; pass the right artifact")
    recorded = {entry.path: entry for entry in manifest.files}
    present = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST_NAME}
    for path in sorted(present ^ recorded.keys()):
        raise ArtifactCorruptError(f"{folder / path}: {'not in the manifest' if path in present else 'is missing'}")
    with ThreadPoolExecutor(max_workers=2) as pool:
        for entry, problem in zip(recorded.values(), pool.map(lambda e: _problem(folder, e), recorded.values())):
            if problem:
                raise ArtifactCorruptError(f"{folder / entry.path}: {problem}; make the artifact again")
    return manifest


def remove_stale_staging(parent: Path) -> None:
    """Delete what a killed writer left in `parent`. Call only while holding the folder's lock."""
    for leftover in parent.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard link a file that is never written again, or copy it where links don't reach."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def mapped(path: Path, size_bytes: int | None = None) -> Iterator[memoryview]:
    """The first bytes of a file (None: all), which are read as they are used; the file must not be cut meanwhile."""
    size_bytes = path.stat().st_size if size_bytes is None else size_bytes
    if not size_bytes:
        yield memoryview(b"")
        return
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), size_bytes, access=mmap.ACCESS_READ) as content,
        memoryview(content) as block,
    ):
        yield block


def write_hashed(path: Path, blocks: Iterable[memoryview]) -> str:
    """Write blocks of bytes one after the other and flush them to the disk; their sha256 (hex), taken beside the writing."""

    def write(chunk: memoryview) -> None:
        for start in range(0, len(chunk), _WRITE_BYTES):
            stream.write(chunk[start : start + _WRITE_BYTES])

    def flush() -> None:
        stream.flush()
        os.fsync(stream.fileno())

    with path.open("wb") as stream:
        return hash_beside(write, blocks, end=flush)


def hash_beside(
    write: Callable[[memoryview], object], blocks: Iterable[memoryview], *, end: Callable[[], object] = lambda: None
) -> str:
    """Hand blocks of bytes to `write`, some megabytes at a time; their sha256 (hex), taken in another thread meanwhile.

    `end` is called after the last write; the hash need not have come that far.
    A block must stay as it is until the end; the next one may come when it is ready.
    """
    digest, hashed = hashlib.sha256(), deque[Future[None]]()
    with ThreadPoolExecutor(max_workers=1) as pool:  # one thread, so in order
        try:
            for chunk in _chunks(blocks):
                hashed.append(pool.submit(digest.update, chunk))
                write(chunk)
            end()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        for one in hashed:
            one.result()
    return digest.hexdigest()


def _chunks(blocks: Iterable[memoryview]) -> Iterator[memoryview]:
    return (block[start : start + _CHUNK_BYTES] for block in blocks for start in range(0, len(block), _CHUNK_BYTES))


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise ArtifactCorruptError(f"{path}: a symbolic link; an artifact holds plain files only")
    return [path for path in folder.rglob("*") if path.is_file()]


def _entries(folder: Path, known_sha256: Mapping[str, str]) -> tuple[FileEntry, ...]:
    paths = sorted(path.relative_to(folder).as_posix() for path in _files(folder))
    if not paths:
        raise ArtifactCorruptError(f"{folder}: an artifact with no files is refused")
    return tuple(
        FileEntry(path, (folder / path).stat().st_size, known_sha256.get(path) or file_sha256(folder / path)) for path in paths
    )


def _problem(folder: Path, entry: FileEntry) -> str | None:
    size_bytes = (folder / entry.path).stat().st_size
    if size_bytes != entry.size_bytes:
        return f"{size_bytes} bytes, the manifest says {entry.size_bytes}"
    if file_sha256(folder / entry.path) != entry.sha256:
        return "sha256 differs from the manifest's"
    return None
