"""The processes of an evaluation: engines that write answers, and ranks that measure the held-out loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lib.cluster.group import RankInfo, Worker, WorkerGroup, dispatch
from lib.core.errors import GenerationError, WorkerDiedError
from lib.core.examples import Encoded
from lib.evals.loss import row_losses
from lib.models.decoder import Decoder
from lib.models.hf_fallback import FallbackModel, is_fallback, load_fallback
from lib.models.hf_io import load_full, read_spec
from lib.rollout.engine import Generator, OnFinished
from lib.rollout.types import Generation, SamplingParams


class EngineWorker(Worker):
    """One engine in its own process."""

    def __init__(self, info: RankInfo) -> None:
        super().__init__(info)
        self._engine: Generator | None = None

    @dispatch()
    def open(
        self, folder: Path, policy_digest: str, dtype: Literal["auto", "float32"], max_len: int, kv_cache_gib: float
    ) -> None:
        """Start the engine (see `VllmGenerator`)."""
        # Here and not above: vLLM takes longer to import than all the rest, and a driver never needs it.
        from lib.rollout.vllm_engine import VllmGenerator  # noqa: PLC0415

        self._engine = VllmGenerator(
            folder,
            policy_digest,
            device=self.info.device.partition(":")[0],
            dtype=dtype,
            max_len=max_len,
            kv_cache_gib=kv_cache_gib,
        )

    @dispatch(split="by_rank", merge="all", events="all")
    def generate(self, prompts: list[list[int]], params: dict[str, Any]) -> list[dict[str, Any]]:
        """Plain `Generation`s of this rank's prompts; each finished one is an event {"finished": 1}."""
        assert self._engine is not None
        generations = self._engine.generate(
            prompts, SamplingParams.from_plain(params), lambda count: self.emit({"finished": count})
        )
        return [generation.to_plain() for generation in generations]


class EnginePool:
    """A group of `EngineWorker`s as one `Generator`: prompts are dealt out in turn, and come back in order."""

    def __init__(self, group: WorkerGroup, deadline_seconds: float) -> None:
        self._group = group
        self._deadline_seconds = deadline_seconds

    def open(self, folder: Path, policy_digest: str, *, dtype: str, max_len: int, kv_cache_gib: float) -> None:
        """Start all engines. Raises GenerationError when one doesn't start."""
        self._call("open", folder, policy_digest, dtype, max_len, kv_cache_gib)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[Generation]:
        """One generation for each prompt, in order. Raises GenerationError when an engine fails or dies."""
        num_engines = self._group.num_ranks
        shares = [[list(prompt) for prompt in prompts[rank::num_engines]] for rank in range(num_engines)]

        def count(events: list[dict[str, Any]]) -> None:
            if on_finished is not None:
                on_finished(sum(event["finished"] for event in events))

        answers = self._call("generate", shares, [params.to_plain()] * num_engines, on_events=count)
        found = [Generation.from_plain(answers[index % num_engines][index // num_engines]) for index in range(len(prompts))]
        if any(list(generation.prompt_ids) != list(prompt) for generation, prompt in zip(found, prompts)):
            raise GenerationError("an engine's answers belong to other prompts")
        return found

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._group.call(method, *args, deadline_seconds=self._deadline_seconds, **kwargs)
        except WorkerDiedError as error:
            raise GenerationError(f"an engine failed: {error}") from error


class LossWorker(Worker):
    """Measures the held-out loss of its share of the rows, in float32."""

    @dispatch(split="by_rank", merge="all", events="all")
    def measure(self, rows: list[dict[str, Any]], folder: Path, tokens_per_pack: int, pad_id: int) -> list[list[float]]:
        """[negative log-likelihood, number of targets] of each row; rows done are events {"finished": n}.

        rows: plain `Encoded`s.
        """
        decoder: Decoder | FallbackModel
        if is_fallback(folder):
            decoder, tokens_per_pack = load_fallback(folder), 1  # each row alone, since packing may not be proven
        else:
            with torch.device("meta"):
                decoder = Decoder(read_spec(folder)[1])
            load_full(decoder, folder, torch.float32)
        decoder.to(self.info.device).eval()
        found = row_losses(
            decoder,
            [Encoded(**row) for row in rows],
            tokens_per_pack=tokens_per_pack,
            pad_id=pad_id,
            on_rows=lambda count: self.emit({"finished": count}),
        )
        return [[loss, float(count)] for loss, count in found]
