"""The manifest that makes a folder an artifact: what is in it, how it came to be, and a digest of its content."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.core.errors import ArtifactCorruptError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

Json = dict[str, Any]


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    path: str
    """Relative to the artifact's folder, with forward slashes."""
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact holds.

    `kind`, `files`, `counts` and `meta` are content and make the digest. `lineage`, `versions` and `info` tell how
    the content came to be; two runs that produce the same content have the same digest whatever these say.
    """

    kind: str
    """Name of the artifact's type, such as "dataset" or "checkpoint"."""
    files: tuple[FileEntry, ...]
    """Sorted by path."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows, tokens and whatever else was seen, kept, cut and dropped."""
    meta: Json = field(default_factory=dict)
    """Facts about the content that a reader needs, JSON values only."""
    lineage: dict[str, str] = field(default_factory=dict)
    """Input name -> digest of the artifact, data or configuration it was made from."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library -> version, for those that decide the numbers."""
    info: Json = field(default_factory=dict)
    """Timings and other facts about the run that made it."""

    @property
    def digest(self) -> str:
        """Sha256 (hex) over the canonical JSON of the content fields."""
        content = {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "files": [asdict(entry) for entry in self.files],
            "counts": self.counts,
            "meta": self.meta,
        }
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def to_json(self) -> str:
        """The manifest's text, with the digest of the content and a checksum of everything."""
        body = asdict(self)
        marks = {"format": FORMAT_VERSION, "digest": self.digest, "checksum": digest_of(body)}
        return json.dumps({**marks, **body}, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str, *, where: str) -> "Manifest":
        """Parse a manifest; `where` names the file in errors.

        Raises:
            ArtifactCorruptError: not JSON, another format, a missing field, or a digest that doesn't fit the content.
        """
        try:
            raw = json.loads(text)
            if raw.pop("format") != FORMAT_VERSION:
                raise ValueError(f"this version reads format {FORMAT_VERSION} only")
            recorded, checksum = raw.pop("digest"), raw.pop("checksum")
            raw["files"] = tuple(FileEntry(**entry) for entry in raw["files"])
            manifest = Manifest(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactCorruptError(f"{where}: not a readable manifest ({error}); make the artifact again") from error
        if (manifest.digest, digest_of(asdict(manifest))) != (recorded, checksum) or manifest.to_json() != text:
            raise ArtifactCorruptError(f"{where}: was altered after it was written; make the artifact again")
        return manifest


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest_of(value: object) -> str:
    """Sha256 (hex) of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
