"""A shelf in an object store, by any address that fsspec knows: nothing is renamed, a marker that is written last publishes.

    <address>/claim.json                           the start of the run that may publish
    <address>/step-00000050/<start>/…              the files of a folder, and its manifest
    <address>/step-00000050.published.json         {"folder": "step-00000050/<start>", "manifest_sha256": …}

A start of the run writes to objects of its own, so that late writers of an earlier one spoil nothing. Credentials and
endpoints are fsspec's affair: its environment, its configuration files, the machine's role.
"""

import hashlib
import json
import posixpath
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from lib.core.artifact import hash_beside, mapped
from lib.core.errors import ArtifactCorruptError, ConfigError, InfraError, RunInUseError, UserError
from lib.core.manifest import MANIFEST_NAME, FileEntry, Json, Manifest, canonical_json
from lib.core.versions import library_versions
from lib.train.store_errors import reading, writing
from lib.train.tensor_file import RangedTensors, TensorFile

CLAIM_NAME = "claim.json"
PUBLISHED_SUFFIX = ".published.json"
DAMAGED_PREFIX = "damaged-"
_PART_BYTES = 32 << 20
"""Of an upload in parts; an object of S3 has at most 10,000."""
_READ_BYTES = 8 << 20
_READS_AT_ONCE = 4
_NO_RIGHT = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ClientAuthenticationError")


class StoredObjects:
    """A published folder."""

    def __init__(self, store: AbstractFileSystem, root: str, shown: str) -> None:
        self._store, self._root, self._shown = store, root, shown

    def __str__(self) -> str:
        return self._shown

    def read_bytes(self, name: str) -> bytes:
        with reading(f"{self}/{name}"):
            return bytes(self._store.cat_file(f"{self._root}/{name}"))

    def open_tensors(self, name: str) -> TensorFile:
        with reading(f"{self}/{name}"):
            return RangedTensors(self._store, f"{self._root}/{name}")

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of all objects."""
        with reading(str(self)):
            self._store.invalidate_cache()
            found = self._store.find(self._root, detail=True)
        return {posixpath.relpath(path, self._root): int(info["size"]) for path, info in found.items()}

    def sha256(self, entry: FileEntry, keep: Callable[[bytes], object] = lambda block: None) -> str:
        """Of the object's bytes, each of which is handed to `keep`; some megabytes in memory."""
        digest, path, batch = hashlib.sha256(), f"{self._root}/{entry.path}", _READ_BYTES * _READS_AT_ONCE
        for start in range(0, entry.size_bytes, batch):
            begins = list(range(start, min(start + batch, entry.size_bytes), _READ_BYTES))
            ends = [min(begin + _READ_BYTES, entry.size_bytes) for begin in begins]
            with reading(f"{self}/{entry.path}"):
                blocks = self._store.cat_ranges([path] * len(begins), begins, ends, on_error="raise")
            for block in blocks:
                digest.update(block)
                keep(block)
        return digest.hexdigest()


class ObjectDraft:
    """Objects that no marker names yet."""

    def __init__(self, shelf: "ObjectShelf", name: str, start: str) -> None:
        self._shelf, self._name, self._start = shelf, name, start
        self._folder = f"{name}/{start}"
        self._marking = False

    def __str__(self) -> str:
        return f"{self._shelf}/{self._folder}"

    def write(self, name: str, blocks: Iterable[memoryview]) -> str:
        with writing():
            path = f"{self._shelf.root}/{self._folder}/{name}"
            with self._shelf.store.open(path, "wb", block_size=_PART_BYTES) as stream:
                return hash_beside(stream.write, blocks)

    def add(self, name: str, path: Path) -> str:
        with mapped(path) as content:
            return self.write(name, [content])

    def read_bytes(self, name: str) -> bytes:
        with writing():
            return bytes(self._shelf.store.cat_file(f"{self._shelf.root}/{self._folder}/{name}"))

    def publish(self, kind: str, sha256: Mapping[str, str], meta: Json) -> None:
        self._shelf.check_claim(self._start)
        with writing():
            sizes = self._shelf.stored(self._folder).sizes()
            if sizes.keys() != sha256.keys():
                raise OSError(f"holds {sorted(sizes)}, expected {sorted(sha256)}")
            files = tuple(FileEntry(name, sizes[name], sha256[name]) for name in sorted(sizes))
            manifest = Manifest(kind=kind, files=files, meta=meta, versions=library_versions()).to_json().encode()
            self._shelf.put(f"{self._folder}/{MANIFEST_NAME}", manifest)
            self._marking = True
            marker = {"folder": self._folder, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
            self._shelf.put(f"{self._name}{PUBLISHED_SUFFIX}", canonical_json(marker).encode())

    def discard(self) -> None:
        """Not once a marker may be there: a store can fail to answer and have done what it was asked."""
        if self._marking:
            return
        with suppress(Exception):  # the error that led here is the one to be told
            self._shelf.store.rm(f"{self._shelf.root}/{self._folder}", recursive=True)


class ObjectShelf:
    """Trusts what a marker names and a manifest proves, and nothing else of what lies there."""

    remedy = "Look after the store and the right to write there"

    def __init__(self, address: str) -> None:
        """Raises ConfigError for an address that can't be one."""
        self._address = address.rstrip("/")
        self.store, self.root = _store_at(self._address)

    def __str__(self) -> str:
        return self._address

    def claim(self, start: str) -> None:
        """Two drivers can't be kept apart by a lock here: the later one goes on, the earlier one publishes nothing more."""
        try:
            self.put(CLAIM_NAME, canonical_json({"start": start}).encode())
            self._remove_what_no_marker_names()
        except (PermissionError, FileNotFoundError) as error:
            raise ConfigError(f"{self}: checkpoints can't be kept there: {error}; check address and rights") from error
        except Exception as error:  # stores have exceptions of their own, with no common root
            reason = f"{self}: checkpoints can't be kept there now: {type(error).__name__}: {error}"
            raise (ConfigError if type(error).__name__ in _NO_RIGHT else InfraError)(reason) from error

    def check_claim(self, start: str) -> None:
        """Raises RunInUseError when another start has claimed the shelf, OSError when that can't be seen."""
        with writing():
            holder = json.loads(self.store.cat_file(f"{self.root}/{CLAIM_NAME}"))["start"]
        if holder != start:
            raise RunInUseError(
                f"{self}: another driver has taken this run over ({holder}); this one ({start}) publishes no more"
            )

    def names(self) -> list[str]:
        markers = (name for name in self._entries() if name.endswith(PUBLISHED_SUFFIX) and not name.startswith(DAMAGED_PREFIX))
        return sorted(name.removesuffix(PUBLISHED_SUFFIX) for name in markers)

    def open(self, name: str) -> StoredObjects:
        return self.stored(self._marker(name)["folder"])

    def stored(self, folder: str) -> StoredObjects:
        return StoredObjects(self.store, f"{self.root}/{folder}", f"{self}/{folder}")

    def draft(self, name: str, start: str) -> ObjectDraft:
        return ObjectDraft(self, name, start)

    def verify(self, name: str, kind: str) -> Manifest:
        stored, manifest = self._proven(name, kind)
        with ThreadPoolExecutor(max_workers=2) as pool:
            for entry, found in zip(manifest.files, pool.map(stored.sha256, manifest.files)):
                _check_sha256(stored, entry, found)
        return manifest

    def take(self, name: str, kind: str, target: Path) -> Manifest:
        stored, manifest = self._proven(name, kind)
        for entry in manifest.files:
            path = target / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                _check_sha256(stored, entry, stored.sha256(entry, stream.write))
        return manifest

    def set_aside(self, name: str) -> None:
        marker = f"{name}{PUBLISHED_SUFFIX}"
        with reading(f"{self}/{marker}"):
            self.put(f"{DAMAGED_PREFIX}{marker}", bytes(self.store.cat_file(f"{self.root}/{marker}")))
            self.store.rm_file(f"{self.root}/{marker}")

    def remove(self, name: str) -> None:
        """The marker first, so that nothing half-removed is ever taken for a checkpoint."""
        with writing():
            self.store.rm_file(f"{self.root}/{name}{PUBLISHED_SUFFIX}")
            self._remove(self.store.find(f"{self.root}/{name}"))

    def put(self, name: str, content: bytes) -> None:
        """One small object, there whole or not at all."""
        self.store.pipe_file(f"{self.root}/{name}", content)

    def _proven(self, name: str, kind: str) -> tuple[StoredObjects, Manifest]:
        """The folder that the marker names, and its manifest; all sizes are right. Raises as `verify`."""
        marker = self._marker(name)
        stored = self.stored(marker["folder"])
        where, text = f"{stored}/{MANIFEST_NAME}", stored.read_bytes(MANIFEST_NAME)
        if hashlib.sha256(text).hexdigest() != marker["manifest_sha256"]:
            raise ArtifactCorruptError(f"{where}: sha256 differs from the marker's")
        manifest = Manifest.from_json(text.decode(), where=where)
        if manifest.kind != kind:
            raise UserError(f"{stored}: holds a {manifest.kind!r}, expected a {kind!r}")
        sizes, recorded = stored.sizes(), {entry.path: entry.size_bytes for entry in manifest.files}
        for path in sorted((sizes.keys() - {MANIFEST_NAME}) ^ recorded.keys()):
            raise ArtifactCorruptError(f"{stored}/{path}: {'not in the manifest' if path in sizes else 'is missing'}")
        for path, size_bytes in recorded.items():
            if sizes[path] != size_bytes:
                raise ArtifactCorruptError(f"{stored}/{path}: {sizes[path]} bytes, the manifest says {size_bytes}")
        return stored, manifest

    def _marker(self, name: str) -> Json:
        where = f"{self}/{name}{PUBLISHED_SUFFIX}"
        with reading(where):
            text = self.store.cat_file(f"{self.root}/{name}{PUBLISHED_SUFFIX}")
        try:
            marker = json.loads(text)
            return {"folder": str(marker["folder"]), "manifest_sha256": str(marker["manifest_sha256"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactCorruptError(f"{where}: not a readable marker ({error})") from error

    def _entries(self) -> list[str]:
        """Names of what lies directly on the shelf."""
        with reading(str(self)):
            self.store.invalidate_cache()
            try:
                found = self.store.ls(self.root, detail=False)
            except FileNotFoundError:
                return []
        return [posixpath.basename(path.rstrip("/")) for path in found]

    def _remove_what_no_marker_names(self) -> None:
        kept = set()
        for entry in self._entries():
            if entry.endswith(PUBLISHED_SUFFIX):
                name = entry.removesuffix(PUBLISHED_SUFFIX)
                try:
                    kept.add(self._marker(name)["folder"])
                except ArtifactCorruptError:
                    kept.add(name.removeprefix(DAMAGED_PREFIX))  # one of its folders, nobody knows which
        inside = {path: posixpath.relpath(path, self.root).split("/") for path in self.store.find(self.root)}
        folders = {path: {parts[0], "/".join(parts[:2])} for path, parts in inside.items() if len(parts) > 2}
        self._remove([path for path, names in folders.items() if not names & kept])

    def _remove(self, paths: list[str]) -> None:
        if paths:
            self.store.rm(list(paths))


def _store_at(address: str) -> tuple[AbstractFileSystem, str]:
    try:
        # A listing kept in memory would hide what other processes have written.
        store, root = url_to_fs(address, use_listings_cache=False)
    except Exception as error:  # a malformed address raises whatever its file system likes
        raise ConfigError(f"{address}: not an address that fsspec can open: {error}") from error
    return store, str(root).rstrip("/")


def _check_sha256(stored: StoredObjects, entry: FileEntry, found: str) -> None:
    if found != entry.sha256:
        raise ArtifactCorruptError(f"{stored}/{entry.path}: sha256 differs from the manifest's")
