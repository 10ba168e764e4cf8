"""Tokens added to a vocabulary: planned once, saved beside the tokenizer, the same ids wherever it is loaded."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.core.errors import TokenizerError

PLAN_FILE = "vocab_plan.json"
_VERSION = 2


@dataclass(frozen=True)
class VocabPlan:
    """What is added to a tokenizer."""

    base_size: int
    """Ids of the tokenizer before; the added tokens take `base_size`, `base_size` + 1, ..."""
    special: tuple[str, ...]
    """Added control tokens; first in order."""
    semantic: tuple[str, ...]
    """Added tokens that stand in text, such as ids of items."""
    known: tuple[str, ...] = ()
    """Semantic tokens of earlier plans, which the tokenizer has already."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """All added tokens in order of their ids."""
        return self.special + self.semantic

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return self.base_size + len(self.tokens)

    @property
    def ids(self) -> dict[str, int]:
        """Added token -> id."""
        return {token: self.base_size + number for number, token in enumerate(self.tokens)}

    def save(self, folder: Path) -> None:
        """Write PLAN_FILE into the tokenizer's folder."""
        values = {"version": _VERSION, **asdict(self)}
        (folder / PLAN_FILE).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "VocabPlan | None":
        """The plan of a folder, None where there is none.

        Raises:
            TokenizerError: the file is not a plan.
        """
        path = folder / PLAN_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["version"] != _VERSION:
                raise ValueError("its version is not known")
            lists = (tuple(map(str, values[name])) for name in ("special", "semantic", "known"))
            return VocabPlan(int(values["base_size"]), *lists)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(f"{path}: not a vocabulary plan: {error}; write it with lib.tokens.extend") from error


def plan_vocabulary(
    base_size: int,
    *,
    special: Sequence[str] = (),
    semantic: Sequence[str] = (),
    known: Sequence[str] = (),
) -> VocabPlan:
    """Give ids to new tokens.

    Args:
        base_size: ids that the tokenizer uses.
        known: semantic tokens that it has.
    Raises:
        TokenizerError: a token is empty, has white space at an end, or is given twice.
    """
    tokens = (*special, *semantic)
    for number, token in enumerate(tokens):
        if not token or token != token.strip():
            raise TokenizerError(f"added token {number} is {token!r}; white space around a token is lost when it is read")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise TokenizerError(f"the added token {twice!r} is given twice")
    return VocabPlan(base_size, tuple(special), tuple(semantic), tuple(known))


def planned_text_tokens(folder: Path) -> frozenset[str]:
    """Added tokens that rows may hold: the semantic ones of this plan and of those before it."""
    plan = VocabPlan.read(folder)
    return frozenset(plan.semantic + plan.known) if plan else frozenset()
