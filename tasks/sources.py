"""Flyte types of what users bring: raw data (a file or a folder of files) and a model folder.

Each is an address: a path here or a URI of an object store, so a form in the console takes it as text. The cache key
is the content: the sha256 of the files, or what the listing of a remote address says of them.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, ClassVar

from flytekit import FlyteContext, HashMethod
from flytekit.extend import TypeEngine, TypeTransformer
from flytekit.models.literals import Literal, Primitive, Scalar
from flytekit.models.types import LiteralType, SimpleType

from lib.core.errors import UserError
from lib.core.manifest import digest_of, file_sha256
from lib.core.store import new_workspace
from tasks.cli import install
from tasks.remote import fetch, fingerprint, is_remote, share_credentials, upload


class Source:
    """A file or a folder at an address."""

    what: ClassVar[str]
    folder_only: ClassVar[bool] = False

    def __init__(self, uri: str, fingerprint: str | None = None) -> None:
        self.uri = uri
        self.fingerprint = fingerprint
        """Stands for the content where it is known without reading all of it, such as an object store's checksums."""

    def open(self) -> Path:
        """The file or folder on this machine, downloaded if need be."""
        if is_remote(self.uri):
            return fetch(self.uri, new_workspace() / Path(self.uri.rstrip("/")).name)
        return self.checked_path()

    def checked_path(self) -> Path:
        """Raises UserError: nothing there, the wrong sort of thing, or nothing in it."""
        path = Path(self.uri).expanduser().absolute()
        if not path.exists():
            raise UserError(f"{path}: no such {'folder' if self.folder_only else 'file or folder'}; expected {self.what}")
        if self.folder_only and not path.is_dir():
            raise UserError(f"{path}: a file; expected {self.what}")
        if not any(file.stat().st_size for file in _files(path)):
            raise UserError(f"{path}: empty; expected {self.what}")
        return path

    def content_hash(self) -> str:
        """Sha256 over names and contents of the files here; for a remote address its fingerprint or the address."""
        if self.fingerprint is not None:
            return self.fingerprint
        if is_remote(self.uri):
            return hashlib.sha256(self.uri.encode()).hexdigest()
        path = self.checked_path()
        return digest_of({file.relative_to(path).as_posix(): file_sha256(file) for file in _files(path)})


class RawDataSource(Source):
    """Rows to be ingested. At a remote address they are read where they lie; it may be a glob, or a data set of the Hub."""

    what = "a .jsonl (also .gz, .zst), .parquet or .arrow file, or a folder of them"

    def address(self) -> str:
        """Where the rows are, ready to be read."""
        if not is_remote(self.uri):
            return str(self.checked_path())
        share_credentials(self.uri)
        return self.uri

    def content_hash(self) -> str:
        """Sha256 over names and contents of the files here, or over a remote listing's names, sizes and checksums."""
        return self.fingerprint or fingerprint(self.uri) or super().content_hash()


class ModelSourceFolder(Source):
    """A model folder in the Hugging Face layout."""

    what = "a Hugging Face model folder (config.json, tokenizer.json, *.safetensors)"
    folder_only = True


class SourceTransformer(TypeTransformer[Source]):
    """Between a source and a Flyte literal: the address as text."""

    def __init__(self, python_type: type[Source]) -> None:
        super().__init__(f"postflyte-{python_type.__name__}", python_type)
        self._cls = python_type

    def get_literal_type(self, t: type[Source] | None = None) -> LiteralType:
        return LiteralType(simple=SimpleType.STRING)

    def assert_type(self, t: type[Source], v: Any) -> None:
        if not isinstance(v, self._cls | str | Path):
            raise TypeError(f"expected an address as text, found a {type(v).__name__}")

    def to_literal(self, ctx: FlyteContext, python_val: Any, python_type: type[Source], expected: LiteralType) -> Literal:
        source = python_val if isinstance(python_val, Source) else self._cls(str(python_val))
        uri = source.uri
        if not is_remote(uri):
            path = source.checked_path()
            uri = upload(ctx, path) if is_remote(ctx.file_access.raw_output_prefix) else str(path)
        return Literal(scalar=Scalar(primitive=Primitive(string_value=uri)))

    def to_python_value(self, ctx: FlyteContext, lv: Literal, expected_python_type: type[Source]) -> Source:
        if lv.scalar is None or lv.scalar.primitive is None or not lv.scalar.primitive.string_value:
            raise UserError(f"expected the address of {self._cls.what}, found {lv}")
        return self._cls(lv.scalar.primitive.string_value)


def _files(path: Path) -> list[Path]:
    """The file itself, or all files of a folder but hidden ones."""
    if path.is_file():
        return [path]
    inside = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts))


def _hash_method(cls: type[Source]) -> HashMethod[Any]:
    return HashMethod(lambda value: (value if isinstance(value, Source) else cls(str(value))).content_hash())


for _cls in (RawDataSource, ModelSourceFolder):
    TypeEngine.register(SourceTransformer(_cls))

RawData = Annotated[RawDataSource, _hash_method(RawDataSource)]
ModelSource = Annotated[ModelSourceFolder, _hash_method(ModelSourceFolder)]

install()
