"""Tokens that a model gets before it is trained."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from lib.config.base import Frozen

MAX_TOKENS = 1 << 20


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class TokenRange(Frozen):
    """Numbered tokens, such as the codes of items."""

    pattern: str = Field(min_length=3, max_length=256)
    """Text with one `{}`, which becomes 0, 1, ..."""
    count: int = Field(ge=1, le=MAX_TOKENS)

    @model_validator(mode="after")
    def _one_place(self) -> "TokenRange":
        if self.pattern.count("{}") != 1:
            raise ValueError(f"pattern {self.pattern!r} must hold {{}} once, where the number goes")
        return self

    @property
    def tokens(self) -> list[str]:
        before, _, after = self.pattern.partition("{}")
        return [f"{before}{number}{after}" for number in range(self.count)]


class VocabularyConfig(Frozen):
    """What is added to tokenizer, embedding and head. Empty: the model stays as it is.

    A new row is the mean of the rows of its description's tokens where it has one, a given vector where there are vectors,
    and else the mean of the rows of all tokens.
    """

    special: Texts = Field(default=(), max_length=4096)
    """Control tokens, in order of their ids; a row of data that spells one is treated as `config.data.control_tokens` says."""
    semantic: Texts = Field(default=(), max_length=MAX_TOKENS)
    """Tokens that rows of data hold, such as ids of items; their ids follow those of `special`."""
    ranges: Annotated[tuple[TokenRange, ...], BeforeValidator(_as_tuple)] = Field(default=(), max_length=256)
    """More of those, numbered; their ids follow those of `semantic`, range after range."""
    descriptions: dict[str, str] = Field(default_factory=dict)
    """Added token -> text that says what it means."""
    vectors: str = Field(default="", max_length=4096)
    """Path or URL of a safetensors file: "embed" [N, D] and, for a model whose head is not tied, "head" [N, D] or nothing;
    a row for each token of `semantic` and `ranges` together, in order."""
    vectors_digest: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """Sha256 of that file, so that changed vectors are a changed input; a run without it is refused and names it."""
    eos_token: str | None = Field(default=None, min_length=1)
    """Ends a text from now on; None: the tokenizer's."""
    pad_token: str | None = Field(default=None, min_length=1)
    """Fills slots that hold no token from now on; None: the tokenizer's."""
    chat_template: str | None = Field(default=None, min_length=1, max_length=1 << 16)
    """Jinja template in place of the tokenizer's; None: the tokenizer's."""

    @property
    def is_empty(self) -> bool:
        return self == VocabularyConfig()

    @property
    def text_tokens(self) -> tuple[str, ...]:
        """Of `semantic` and `ranges`."""
        return (*self.semantic, *(token for part in self.ranges for token in part.tokens))

    @model_validator(mode="after")
    def _parts_fit(self) -> "VocabularyConfig":
        added = {*self.special, *self.text_tokens}
        if unknown := sorted(self.descriptions.keys() - added):
            raise ValueError(f"descriptions has {unknown[0]!r}, which is no added token; add it to special or semantic")
        if (digest := self.vectors_digest) and not self.vectors:
            raise ValueError(f"vectors_digest ({digest[:8]}...) goes with vectors, which is not set")
        if self.vectors and (both := sorted(self.descriptions.keys() & set(self.text_tokens))):
            raise ValueError(f"{both[0]!r} has a description and a row of vectors; leave one out")
        if self.vectors and not self.text_tokens:
            raise ValueError("vectors are for the tokens of semantic and ranges, and there are none")
        return self
