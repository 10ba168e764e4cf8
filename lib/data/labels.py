"""Labels of packed rows as tensors, in the shapes that heads put out. Letters: B rows, T tokens, N documents."""

import json
from collections.abc import Sequence

import numpy as np
import torch

from lib.config.heads import HeadConfig, HeadsConfig
from lib.core.errors import DataError
from lib.data.checks import RowRefused
from lib.data.document import Document, PackedRow
from lib.data.schemas.labels import check_fit


def collate_labels(rows: Sequence[PackedRow], sequence_length: int, config: HeadsConfig) -> dict[str, torch.Tensor]:
    """Name -> what each head but the language model's should put out: a number, or the number of a label; NaN where it is
    not told.

    Returns: float32, [N] in the order of the documents for those by document, [B, T] for those by token.
    Raises:
        DataError: a row's labels don't fit the heads; names the row.
    """
    by_document: dict[str, list[float]] = {head.name: [] for head in config.outputs if not head.by_token}
    by_token = {
        head.name: np.full((len(rows), sequence_length), np.nan, np.float32) for head in config.outputs if head.by_token
    }
    for number, row in enumerate(rows):
        start = 0
        for document in row.documents:
            stop = start + len(document.token_ids)
            given = _labels(document, config)
            for head in config.outputs:
                if head.by_token:
                    by_token[head.name][number, start:stop] = _by_token(head, given.get(head.name), document)
                else:
                    by_document[head.name].append(_number(head, given.get(head.name)))
            start = stop
    values = {name: np.array(numbers, np.float32) for name, numbers in by_document.items()} | by_token
    return {head.name: torch.from_numpy(values[head.name]) for head in config.outputs}


def _labels(document: Document, config: HeadsConfig) -> dict[str, float | str | list[float | str | None]]:
    try:
        check_fit(document.labels, config.heads)
    except RowRefused as refused:
        raise DataError(f"row {document.sample_id!r} {refused}") from refused
    return {} if document.labels is None else json.loads(document.labels)


def _number(head: HeadConfig, value: float | str | list[float | str | None] | None) -> float:
    if value is None:
        return np.nan
    assert not isinstance(value, list)
    return head.labels.index(value) if isinstance(value, str) else value


def _by_token(head: HeadConfig, value: float | str | list[float | str | None] | None, document: Document) -> np.ndarray:
    """[T]: a single value counts for the tokens of the loss mask, such as the answer's; a list has one for each token."""
    if not isinstance(value, list):
        return np.where(document.loss_mask, _number(head, value), np.nan)
    if len(value) != len(document.token_ids):
        raise DataError(
            f"row {document.sample_id!r} labels: {head.name} has {len(value)} values, but this tokenizer and chat format make "
            f"{len(document.token_ids)} tokens of the row; give one for each, null where there is none, or a single value"
        )
    return np.array([_number(head, item) for item in value], np.float32)
