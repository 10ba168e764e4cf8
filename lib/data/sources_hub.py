"""Data sets of the Hugging Face Hub: `datasets` says which files make up a split, and they are read where they lie."""

import re
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, urlsplit

from lib.core.errors import DataError, InfraError
from lib.core.transient import is_transient
from lib.data.sources_listing import SourceFile, files_at

_NAME = re.compile(r"hf://datasets/(?P<name>[^/@?]+/[^/@?]+)(?:@(?P<revision>[^?]+))?/?(?:\?(?P<options>.*))?")
_OPTIONS = ("config", "split")


def is_hub_name(where: str) -> bool:
    """Whether an address is of a whole data set of the Hub; one that goes on with a path is of files in it."""
    return _NAME.fullmatch(where) is not None


def hub_files(where: str) -> list[SourceFile]:
    """The files of `hf://datasets/owner/name[@revision][?config=...&split=...]`; the split is "train" where none is named.

    Other formats than ours are on the Hub in Parquet under the revision `refs/convert/parquet`.

    Raises:
        DataError: no such data set, config or split, no right to read it, or files of another format.
        InfraError: the Hub did not answer.
    """
    match = _NAME.fullmatch(where)
    assert match is not None
    options = dict(parse_qsl(match["options"] or "", keep_blank_values=True))
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise DataError(f"{where}: unknown option {unknown[0]!r}; an address may name {' and '.join(_OPTIONS)}")
    return resolved_files(match["name"], where, options.get("config"), options.get("split", "train"), match["revision"])


def resolved_files(name: str, where: str, config: str | None, split: str, revision: str | None = None) -> list[SourceFile]:
    """The files of a split of a data set by `name` (of the Hub, or a folder laid out like one); see `hub_files`."""
    import datasets  # noqa: PLC0415 - takes seconds, and few sources are of the Hub

    try:
        # Only modules of the library itself build data sets here; a repository's own code is never run.
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        data_files = builder.config.data_files or {}
    except Exception as error:  # the library's errors have no common root
        if is_transient(error):
            raise InfraError(f"{where}: the Hub did not answer: {type(error).__name__}: {error}") from error
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{where}: `datasets` can't resolve it: {message}; name config and split as ?config=...&split=..."
        ) from error
    if split not in data_files:
        raise DataError(f"{where}: has no split {split!r}; it has {', '.join(map(str, data_files)) or 'none'}; add ?split=...")
    addresses = [str(address) for address in data_files[split]]
    return files_at({_name_within(address, name): address for address in addresses})


def _name_within(address: str, name: str) -> str:
    """The path of a file in its repository or folder."""
    path = urlsplit(address).path if "://" in address else address
    if address.startswith("hf://"):
        return path.split("/", 3)[-1] if path.count("/") > 2 else PurePosixPath(path).name
    return path.removeprefix(str(PurePosixPath(name))).lstrip("/")
