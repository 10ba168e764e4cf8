"""An object store in memory whose user dies at a chosen put or delete: from then on no call reaches the store."""

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

MOMENTS = ("before", "half", "after")
"""A put or delete was not made; a put left half an object; it was made, and nobody heard of it."""


class UserKilledError(OSError):
    """What the rest of a killed process would see, if it saw anything."""


class FragileStore(MemoryFileSystem):  # type: ignore[misc]
    """`fragile://…`, one store a process."""

    protocol = "fragile"
    store: dict[str, Any] = {}  # noqa: RUF012 - as its parent has it
    pseudo_dirs = [""]  # noqa: RUF012
    kill_at = 0
    """Number of the put or delete; 0: none."""
    moment = "before"
    num_changes = 0
    """Puts and deletes so far."""
    num_bytes_read = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("fragile://").strip("/")

    @classmethod
    def revive(cls, *, kill_at: int = 0, moment: str = "before") -> None:
        """A new process uses it, and will be killed at the change of that number."""
        cls.kill_at, cls.moment, cls.num_changes = kill_at, moment, 0

    @classmethod
    def is_dead(cls) -> bool:
        return 0 < cls.kill_at <= cls.num_changes

    @classmethod
    def dump(cls, root: str) -> dict[str, bytes]:
        """Path -> content of all objects below an address."""
        below = cls._strip_protocol(root) + "/"
        return {path: file.getvalue() for path, file in cls.store.items() if path.startswith(below)}

    def restore(self, root: str, objects: dict[str, bytes]) -> None:
        """Make these the objects below an address."""
        for path in self.dump(root).keys() - objects.keys():
            del self.store[path]
        for path, content in objects.items():
            super()._open(path, "wb", data=content)

    def _changes(self) -> bool:
        """Counts a change; whether this is the one at which the process dies. Raises when it is dead already."""
        kind = type(self)
        self._check_alive()
        kind.num_changes += 1
        if self.is_dead() and kind.moment == "before":
            raise UserKilledError("killed")
        return self.is_dead()

    def _check_alive(self) -> None:
        if self.is_dead():
            raise UserKilledError("killed before")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "r" in mode:
            self._check_alive()
            return super()._open(path, mode, **kwargs)
        dies, content = self._changes(), kwargs.get("data")
        if dies and self.moment == "half" and content is not None:
            kwargs["data"] = content[: len(content) // 2]
        opened = super()._open(path, mode, **kwargs)
        if dies and (content is not None or self.moment == "half"):
            raise UserKilledError("killed")
        return opened

    def _rm(self, path: str) -> None:
        dies = self._changes()
        super()._rm(path)
        if dies:
            raise UserKilledError("killed")

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._check_alive()
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._check_alive()
        found: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        type(self).num_bytes_read += len(found)
        return found


def fragile_store() -> FragileStore:
    """The store, whole and empty."""
    fsspec.register_implementation("fragile", FragileStore, clobber=True)
    FragileStore.store.clear()
    FragileStore.revive()
    return FragileStore()
