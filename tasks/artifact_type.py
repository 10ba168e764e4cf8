"""How an artifact becomes a Flyte type: what travels is a URI, what makes the cache key is the content.

A value made by a task is a folder with a manifest. Run locally it is moved into the artifact store as
`<kind>/<digest>`, so equal content is one folder; run on a cluster it is uploaded under the execution's output prefix.
A reader gets a local folder that has been verified against its manifest, or an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from flytekit import BlobType, FlyteContext
from flytekit.extend import TypeTransformer
from flytekit.models.literals import Blob, BlobMetadata, Literal, Scalar
from flytekit.models.types import LiteralType
from flytekit.types.directory import FlyteDirectory

from lib.core.artifact import Staged, read_manifest, stage_artifact, verify
from lib.core.errors import UserError
from lib.core.manifest import MANIFEST_NAME, Manifest
from lib.core.store import keep, new_workspace
from tasks.remote import converting, fetch, is_remote, upload


class Artifact:
    """A folder with a manifest, by URI (a path or an address of an object store)."""

    kind: ClassVar[str]

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @classmethod
    def create(cls) -> Self:
        """A new artifact of this kind, to be filled through `write()`."""
        return cls(str(new_workspace() / cls.kind))

    @contextmanager
    def write(self) -> Iterator[Staged]:
        """Fill the staged folder; published when the block ends without an exception."""
        with stage_artifact(Path(self.uri), self.kind) as staged:
            yield staged

    def open(self) -> Path:
        """A local folder whose every file has been checked against the manifest.

        Raises:
            ArtifactCorruptError: a file is missing or altered, or the artifact is of another kind.
            UserError: there is nothing at the URI.
        """
        if is_remote(self.uri):
            folder = fetch(self.uri, new_workspace() / self.kind)
            verify(folder, self.kind)
            return keep(folder)
        if not Path(self.uri).is_dir():
            raise UserError(f"{self.uri}: no such folder; expected a {self.kind} artifact")
        verify(Path(self.uri), self.kind)
        return Path(self.uri)

    def manifest(self) -> Manifest:
        """The manifest alone; the files aren't looked at."""
        folder = Path(self.uri)
        if is_remote(self.uri):
            folder = new_workspace()
            fetch(f"{self.uri.rstrip('/')}/{MANIFEST_NAME}", folder / MANIFEST_NAME)
        return read_manifest(folder)

    @property
    def digest(self) -> str:
        return self.manifest().digest

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"


class ArtifactTransformer(TypeTransformer[Artifact]):
    """Between an artifact and a Flyte literal: a multipart blob whose format is the artifact's kind."""

    def __init__(self, python_type: type[Artifact]) -> None:
        super().__init__(f"postflyte-{python_type.kind}", python_type)
        self._cls = python_type

    def get_literal_type(self, t: type[Artifact] | None = None) -> LiteralType:
        return LiteralType(blob=BlobType(f"postflyte-{self._cls.kind}", BlobType.BlobDimensionality.MULTIPART))

    def assert_type(self, t: type[Artifact], v: Any) -> None:
        if not isinstance(v, self._cls | FlyteDirectory | str | Path):
            raise TypeError(f"expected a {self._cls.kind} artifact or its path, found a {type(v).__name__}")

    @converting()
    def to_literal(self, ctx: FlyteContext, python_val: Any, python_type: type[Artifact], expected: LiteralType) -> Literal:
        artifact = python_val if isinstance(python_val, Artifact) else self._cls(_uri(python_val))
        if not is_remote(artifact.uri):
            folder = keep(artifact.open())
            artifact.uri = upload(ctx, folder) if is_remote(ctx.file_access.raw_output_prefix) else str(folder)
        return Literal(scalar=Scalar(blob=Blob(BlobMetadata(self.get_literal_type().blob), artifact.uri)))

    def to_python_value(self, ctx: FlyteContext, lv: Literal, expected_python_type: type[Artifact]) -> Artifact:
        if lv.scalar is None or lv.scalar.blob is None:
            raise UserError(f"expected a {self._cls.kind} artifact, found {lv}")
        return self._cls(lv.scalar.blob.uri)


@converting()
def content_hash(value: Any) -> str:
    """The manifest's digest: what stands for an artifact in cache keys."""
    return (value if isinstance(value, Artifact) else Artifact(_uri(value))).digest


def _uri(value: Any) -> str:
    if isinstance(value, FlyteDirectory):
        return str(value.remote_source or value.path)
    return str(value)
