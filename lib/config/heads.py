"""What a model puts out, and how each output is trained."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lib.config.base import Frozen, Number


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


NAME_PATTERN = r"^[a-z][a-z0-9_]{0,63}$"
Loss = Literal["cross_entropy", "squared_error", "logistic"]


class HeadConfig(Frozen):
    """One output of a model."""

    name: str = Field(pattern=NAME_PATTERN)
    """Under which it is trained, saved and reported."""
    kind: Literal["lm", "scalar", "classification"]
    """The next token's logits, one number, or a logit for each label."""
    labels: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(default=(), max_length=1 << 16)
    """Of a classification, in order of their numbers."""
    per: Literal["document", "token"] | None = None
    """One output for each document, at its last token, or one for each token. None: the kind "lm" by token, others by
    document."""
    loss: Loss | None = None
    """None: "cross_entropy" for logits, "squared_error" for numbers. "logistic", for a number: cross-entropy of its sigmoid."""
    weight: Number = Field(default=1.0, ge=0.0)
    """Of its loss in the sum over all heads."""

    @property
    def num_outputs(self) -> int:
        return len(self.labels) or 1

    @property
    def by_token(self) -> bool:
        return self.per == "token" or self.kind == "lm"

    @property
    def definition(self) -> str:
        """What its outputs are; weights of one definition fit another head of the same."""
        labels = f" of {list(self.labels)}" if self.labels else ""
        return f"{self.kind} by {'token' if self.by_token else 'document'}{labels}"

    @property
    def trained_by(self) -> Loss:
        return self.loss or ("squared_error" if self.kind == "scalar" else "cross_entropy")

    @model_validator(mode="after")
    def _kind_fits(self) -> "HeadConfig":
        if (self.kind == "classification") != bool(self.labels) or len(self.labels) == 1:
            raise ValueError(f"head {self.name!r}: labels ({len(self.labels)}) go with classification, which has two or more")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"head {self.name!r}: a label is given twice")
        if self.kind == "lm" and self.per == "document":
            raise ValueError(f"head {self.name!r}: the kind lm puts out logits by token")
        if (self.trained_by == "cross_entropy") != (self.kind != "scalar"):
            raise ValueError(f"head {self.name!r}: loss {self.loss!r} does not fit the kind {self.kind!r}")
        return self


class HeadsConfig(Frozen):
    """All outputs of a model."""

    heads: Annotated[tuple[HeadConfig, ...], BeforeValidator(_as_tuple)] = Field(min_length=1, max_length=256)

    @property
    def lm(self) -> HeadConfig | None:
        return next((head for head in self.heads if head.kind == "lm"), None)

    @property
    def outputs(self) -> tuple[HeadConfig, ...]:
        """Those with weights of their own: all but the language model's."""
        return tuple(head for head in self.heads if head.kind != "lm")

    @property
    def alone(self) -> HeadConfig | None:
        """The only head, if it has one output a document."""
        only = self.heads[0]
        return None if len(self.heads) > 1 or only.by_token else only

    @model_validator(mode="after")
    def _heads_fit(self) -> "HeadsConfig":
        names = [head.name for head in self.heads]
        if len(set(names)) < len(names):
            raise ValueError(f"two heads have one name in {names}")
        if sum(head.kind == "lm" for head in self.heads) > 1:
            raise ValueError("there are two heads of kind lm; a model has one")
        if not any(head.weight for head in self.heads):
            raise ValueError("every head has weight 0, so nothing would be trained")
        return self
