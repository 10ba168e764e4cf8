"""The part of a source that is ingested on its own, as a plain value named by its content."""

from lib.config.base import Frozen
from lib.config.rows import RowsConfig
from lib.core.manifest import digest_of


class ShardFile(Frozen):
    """A file as it was when the shards were planned; see SourceFile."""

    name: str
    opened_by: str
    path: str
    size_bytes: int
    stamp: str
    guard: tuple[str, ...]
    format: str
    compression: str | None


class SourceShard(Frozen):
    """Some splits of a source, and how their rows are read."""

    source: str
    """What errors call the whole."""
    number: int
    """From 1."""
    num_shards: int
    files: tuple[ShardFile, ...]
    first: int
    stop: int
    """Half-open range of the files' splits, counted over all of them."""
    rows: RowsConfig
    """With the kind and the layout of the whole source."""

    @property
    def title(self) -> str:
        """What errors call it."""
        return self.source if self.num_shards == 1 else f"{self.source} (part {self.number} of {self.num_shards})"

    @property
    def content(self) -> str:
        """Digest of all that decides its examples: what is in the files, and not where they are."""
        files = [[file.name, file.size_bytes, file.stamp] for file in self.files]
        return digest_of([files, self.first, self.stop, self.rows.model_dump(mode="json")])

    @property
    def digest(self) -> str:
        """Of all that decides what is made of it: its content, and where the rows stay where they are, the places, too."""
        if self.rows.read != "in_place":
            return self.content
        return digest_of([self.content, self.source, *([file.opened_by, file.path, *file.guard] for file in self.files)])
