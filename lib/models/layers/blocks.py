"""The tokens of a batch cut into blocks of queries, each with the run of keys that its queries may see."""

from dataclasses import dataclass

import torch

from lib.models.layers.documents import DocumentLayout


@dataclass(frozen=True)
class Block:
    """Queries `start` to `end`; none of them sees a key before `first` or from `end` on. Positions within a piece."""

    first: int
    start: int
    end: int
    hidden: tuple[tuple[slice, torch.Tensor], ...]
    """(run of keys, counted from `first`; [queries, keys of the run] 0 where the query sees the key, else -inf). All see
    all other keys."""

    @property
    def num_queries(self) -> int:
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class Piece:
    """A run of the flattened tokens."""

    num_tokens: int
    blocks: tuple[Block, ...] = ()
    """In order; of any two the later one's keys end later and begin no earlier."""
    padding: tuple[slice, ...] = ()
    """Tokens in no block."""
    fused: bool = False
    """One long document, for a fused kernel instead of blocks."""

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The queries of each block, views of x [..., T, H]."""
        cuts = [edge for block in self.blocks for edge in (block.start, block.end)]
        return list(x.tensor_split(cuts, dim=-2)[1::2])


def cut(layout: DocumentLayout, window: int | None, *, block_queries: int, fused_tokens: int | None) -> list[Piece]:
    """Pieces that cover the flattened tokens in order.

    Args:
        window: keys that a query sees, its own included; None: all of its document up to its own.
        block_queries: queries of a block at most; documents that fit one together share it.
        fused_tokens: documents longer than this that no window touches are pieces of their own; None: none is.
    """
    pieces: list[Piece] = []
    cursor, documents = 0, list[tuple[int, int]]()
    num_tokens = layout.document_ids_BT.numel()
    for start, end in layout.flat_ranges():
        if fused_tokens is not None and end - start > fused_tokens and (window is None or window >= end - start):
            pieces += [_blocked(documents, cursor, start, window, block_queries), Piece(end - start, fused=True)]
            cursor, documents = end, []
        else:
            documents.append((start, end))
    pieces.append(_blocked(documents, cursor, num_tokens, window, block_queries))
    return [piece for piece in pieces if piece.num_tokens]


def _blocked(documents: list[tuple[int, int]], start: int, end: int, window: int | None, block_queries: int) -> Piece:
    """Documents within the run from start to end."""
    groups: list[list[tuple[int, int]]] = []
    for document in ((first - start, last - start) for first, last in documents):
        if groups and groups[-1][-1][1] == document[0] and document[1] - groups[-1][0][0] <= block_queries:
            groups[-1].append(document)
        else:
            groups.append([document])
    bounds = [0, *(edge for group in groups for edge in (group[0][0], group[-1][1])), end - start]
    padding = tuple(slice(left, right) for left, right in zip(bounds[::2], bounds[1::2]) if left < right)
    return Piece(end - start, tuple(block for group in groups for block in _blocks(group, window, block_queries)), padding)


def _blocks(documents: list[tuple[int, int]], window: int | None, block_queries: int) -> list[Block]:
    """Of one document, or of neighbours that fit a block together."""
    group_start, group_end = documents[0][0], documents[-1][1]
    number = torch.arange(len(documents)).repeat_interleave(torch.tensor([end - start for start, end in documents]))
    blocks = []
    for start in range(group_start, group_end, block_queries):
        end = min(start + block_queries, group_end)
        first = group_start if window is None else max(group_start, start - window + 1)
        # Some query doesn't see it: of the block's own keys, and behind a window of as many at the beginning.
        edges = [(start, end)] if window is None else [(first, min(first + block_queries, start)), (start, end)]
        hidden = []
        for left, right in edges:
            queries, keys = torch.arange(start, end)[:, None], torch.arange(left, right)
            sees = (keys <= queries) & (number[queries - group_start] == number[keys - group_start])
            if window is not None:
                sees &= keys > queries - window
            hidden.append((slice(left - first, right - first), torch.where(sees, 0.0, float("-inf"))))
        blocks.append(Block(first, start, end, tuple(hidden)))
    return blocks
