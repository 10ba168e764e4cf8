"""What goes into an engine and what comes out: token ids, never text."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

StopReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """Ids that end a generation; the one that did is part of it."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    seed: int = 0
    """With a temperature: prompt i of a call draws from a stream of (seed, i) alone."""

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> "SamplingParams":
        return SamplingParams(**{**plain, "stop_ids": tuple(plain["stop_ids"])})


@dataclass(frozen=True)
class Generation:
    """What an engine wrote after one prompt."""

    prompt_ids: tuple[int, ...]
    """[P]"""
    token_ids: tuple[int, ...]
    """[T] including the stop token where there is one."""
    logprobs: tuple[float, ...]
    """[T] log-probability of each token under the distribution it was drawn from (at temperature 0: the model's own)."""
    stop_reason: StopReason
    """"stop": a stop token; "length": cut at max_new_tokens."""
    policy_digest: str
    """Of the model that wrote it."""
    params: SamplingParams

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> "Generation":
        lists = {name: tuple(plain[name]) for name in ("prompt_ids", "token_ids", "logprobs")}
        return Generation(**{**plain, **lists, "params": SamplingParams.from_plain(plain["params"])})
