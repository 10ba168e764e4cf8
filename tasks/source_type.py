"""How an address that a user brings becomes a Flyte type: text in a form, content in the cache key.

Content is the sha256 of files here, and what the store's listing says of remote ones. Whoever compiles can't look there, so a
fixed input of a launch plan stands for itself; an uncached task stamps it before a cached one takes it.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

from flytekit import FlyteContext, FlyteContextManager, HashMethod
from flytekit.extend import TypeTransformer
from flytekit.models.literals import Literal, Primitive, Scalar
from flytekit.models.types import LiteralType, SimpleType

from lib.core.errors import UserError
from lib.core.manifest import digest_of, file_sha256
from lib.core.store import new_workspace
from tasks.remote import LISTED, converting, fetch, fingerprint, is_remote, upload

_UNSTAMPED = "address:"
"""Begins the key of a remote address that nobody has looked at."""


class Source:
    """A file or a folder at an address."""

    what: ClassVar[str]
    folder_only: ClassVar[bool] = False
    left_behind: ClassVar[tuple[str, ...]] = ()
    """Endings of files of a remote folder that are not downloaded."""

    def __init__(self, uri: str, fingerprint: str | None = None) -> None:
        self.uri = uri
        self.fingerprint = fingerprint
        """Of the content, as it was when somebody looked at it; None where nobody has."""

    def open(self) -> Path:
        """The file or folder on this machine, downloaded if need be.

        Raises:
            UserError: what was downloaded is other content than when a task looked at it.
        """
        if not is_remote(self.uri):
            return self.checked_path()
        folder = fetch(self.uri, new_workspace() / Path(self.uri.rstrip("/")).name, left_behind=self.left_behind)
        if self.fingerprint and self.fingerprint.startswith(LISTED) and self.fingerprint != fingerprint(self.uri):
            raise UserError(f"{self.uri}: was altered since this run looked at it; leave it in place and run again")
        return folder

    def stamped(self) -> Self:
        """The same with the fingerprint of what is there now."""
        return type(self)(self.uri, type(self)(self.uri).content_hash())

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
        """Sha256 over names and contents of the files here, or over names, sizes and stamps of a remote listing."""
        known = self.fingerprint or fingerprint(self.uri)
        if known:
            return known
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
        if not is_remote(uri := source.uri):
            path = source.checked_path()
            uri = upload(ctx, path) if is_remote(ctx.file_access.raw_output_prefix) else str(path)
        return Literal(scalar=Scalar(primitive=Primitive(string_value=uri)))

    def to_python_value(self, ctx: FlyteContext, lv: Literal, expected_python_type: type[Source]) -> Source:
        if lv.scalar is None or lv.scalar.primitive is None or not lv.scalar.primitive.string_value:
            raise UserError(f"expected the address of {self._cls.what}, found {lv}")
        known = lv.hash if lv.hash and not lv.hash.startswith(_UNSTAMPED) else None
        return self._cls(lv.scalar.primitive.string_value, known)


def _files(path: Path) -> list[Path]:
    """The file itself, or all files of a folder but hidden ones."""
    if path.is_file():
        return [path]
    inside = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts))


def hash_method(cls: type[Source]) -> HashMethod[Any]:
    """The cache key of a value of a source's type."""
    return HashMethod(lambda value: _key(value if isinstance(value, Source) else cls(str(value))))


@converting()
def _key(source: Source) -> str:
    """By content where tasks run; where one only compiles, the store is left alone."""
    state = FlyteContextManager.current_context().execution_state
    compiling = state is None or state.mode is None
    return f"{_UNSTAMPED}{source.uri}" if compiling and is_remote(source.uri) else source.content_hash()
