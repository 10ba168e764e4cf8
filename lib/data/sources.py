"""Where rows come from: files here or in an object store, in any format we read, or data sets of the Hub."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.data.sources_columns import arrow_splits, parquet_splits, read_arrow, read_parquet
from lib.data.sources_hub import hub_files, is_hub_name
from lib.data.sources_jsonl import jsonl_splits, read_jsonl
from lib.data.sources_listing import SourceFile, list_files, listing_digest
from lib.data.sources_types import RawRow as RawRow
from lib.data.sources_types import RowSource as RowSource
from lib.data.sources_types import Split as Split

_SPLITS: dict[str, Callable[[SourceFile], list[Split]]] = {
    "jsonl": jsonl_splits,
    "parquet": parquet_splits,
    "arrow": arrow_splits,
}
_READERS: dict[str, Callable[[SourceFile, Split, int, int], Iterator[RawRow]]] = {
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
_OPENERS = 8
"""Files whose ends are looked at side by side: a store answers each in tens of milliseconds."""


def open_source(where: str | Path) -> "FileSource":
    """The rows at an address; nothing but the listing and the files' indices is read.

    Args:
        where: a .jsonl (also .gz, .zst), .parquet or .arrow file, a folder of them, or a glob; the folder of a saved
            Hugging Face data set; any address fsspec knows (`s3://bucket/folder`), with credentials from the environment;
            `hf://datasets/owner/name` for a data set of the Hub, see `hub_files`.
    Raises:
        DataError: nothing there, no right to read it, or a file that isn't what its name says.
    """
    return FileSource(hub_files(str(where)) if is_hub_name(str(where)) else list_files(where))


class FileSource:
    """Files, read split by split. A `RowSource`."""

    def __init__(self, files: list[SourceFile], *, first: int = 0, stop: int | None = None) -> None:
        """Args: first, stop: a range of the files' splits, where it is to have only those."""
        self.files = files
        self.digest = listing_digest(files)
        self.num_files = 0 if first else len(files)
        """Of several sources that share the splits of a file, the first one counts it."""
        with ThreadPoolExecutor(_OPENERS) as pool:
            found = list(pool.map(lambda file: _SPLITS[file.format](file), files))
        self.num_splits_of = [len(splits) for splits in found]
        """[files]"""
        self.splits = [split for splits in found for split in splits][first:stop]
        self._file_of = [file for file, splits in zip(files, found) for _ in splits][first:stop]

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[RawRow]:
        """See `RowSource.read`."""
        file = self._file_of[split]
        file.check_unaltered()
        return _READERS[file.format](file, self.splits[split], start, step)
