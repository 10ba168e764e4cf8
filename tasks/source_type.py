"""How an address that a user brings becomes a Flyte type: text in a form, content in the cache key.

The address is a path here or a URI of an object store. Its key is the sha256 of the files, or what a remote listing says.
"""

import hashlib
from pathlib import Path
from typing import Any, ClassVar

from flytekit import FlyteContext, FlyteContextManager, HashMethod
from flytekit.extend import TypeTransformer
from flytekit.models.literals import Literal, Primitive, Scalar
from flytekit.models.types import LiteralType, SimpleType

from lib.core.errors import UserError
from lib.core.manifest import digest_of, file_sha256
from lib.core.store import new_workspace
from tasks.remote import fetch, is_remote, upload


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


def hash_method(cls: type[Source]) -> HashMethod[Any]:
    """The cache key of a value of a source's type."""
    return HashMethod(lambda value: _key(value if isinstance(value, Source) else cls(str(value))))


def _key(source: Source) -> str:
    """By content where tasks run. Compiling must not need the store, so there a remote address stands for itself."""
    state = FlyteContextManager.current_context().execution_state
    return Source.content_hash(source) if state is None or state.mode is None else source.content_hash()
