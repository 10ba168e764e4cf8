"""vLLM as a generator: token ids in, token ids and the sampler's log-probabilities out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm
from vllm import LLM, RequestOutput, TokensPrompt
from vllm import SamplingParams as VllmSamplingParams

from lib.core.errors import GenerationError
from lib.core.seeding import derive_seed
from lib.rollout.engine import OnFinished
from lib.rollout.types import Generation, SamplingParams, StopReason

CPU_BLOCK_TOKENS = 32
"""Tokens in a block of the key-value cache, the smallest that vLLM's CPU attention takes: prompts share whole blocks only,
and those of an evaluation begin alike."""


class VllmGenerator:
    """One engine in this process, which must have been started with `engine_environment`."""

    def __init__(
        self,
        folder: Path,
        policy_digest: str,
        *,
        device: str,
        dtype: Literal["auto", "float32"],
        max_len: int,
        kv_cache_gib: float,
    ) -> None:
        """Load a model folder.

        Args:
            dtype: "auto" takes the checkpoint's own.
            max_len: most tokens of a prompt and its generation together.
            kv_cache_gib: memory of the key-value cache on CPU; a GPU gives what the weights leave.
        Raises:
            GenerationError: vLLM did not start.
        """
        on_cpu: dict[str, Any] = {"kv_cache_memory_bytes": int(kv_cache_gib * 1024**3), "block_size": CPU_BLOCK_TOKENS}
        try:
            self._llm = LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                trust_remote_code=False,
                generation_config="vllm",
                dtype=dtype,
                max_model_len=max_len,
                enforce_eager=True,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
                **(on_cpu if device == "cpu" else {}),
            )
        except Exception as error:
            raise GenerationError(f"vLLM did not start with {folder}: {type(error).__name__}: {error}") from error
        self._policy_digest = policy_digest

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[Generation]:
        """One generation for each prompt, in order. Raises GenerationError when vLLM fails or leaves a request unfinished."""
        if not prompts:
            return []
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        wishes = [_vllm_params(params, index) for index in range(len(prompts))]
        progress = _Progress.reporting_to(on_finished) if on_finished else False
        try:
            outputs = self._llm.generate(requests, wishes, use_tqdm=progress)
        except Exception as error:
            raise GenerationError(f"vLLM failed while generating: {type(error).__name__}: {error}") from error
        if len(outputs) != len(prompts):
            raise GenerationError(f"vLLM answered {len(outputs)} of {len(prompts)} prompts")
        return [self._generation(prompt, output, params) for prompt, output in zip(prompts, outputs)]

    def _generation(self, prompt: Sequence[int], output: RequestOutput, params: SamplingParams) -> Generation:
        """The sampled token's own log-probability is looked up by its id: the table may hold others, in any order."""
        if list(output.prompt_token_ids or []) != list(prompt) or len(output.outputs) != 1:
            raise GenerationError("vLLM's answer belongs to another prompt")
        answer = output.outputs[0]
        token_ids = tuple(int(token_id) for token_id in answer.token_ids)
        tables = answer.logprobs or []
        if len(tables) != len(token_ids) or any(token_id not in table for token_id, table in zip(token_ids, tables)):
            raise GenerationError("vLLM gave no log-probability for a token that it sampled")
        return Generation(
            prompt_ids=tuple(prompt),
            token_ids=token_ids,
            logprobs=tuple(float(table[token_id].logprob) for token_id, table in zip(token_ids, tables)),
            stop_reason=_stop_reason(answer.finish_reason),
            policy_digest=self._policy_digest,
            params=params,
        )


def _vllm_params(params: SamplingParams, index: int) -> VllmSamplingParams:
    return VllmSamplingParams(
        temperature=params.temperature,
        max_tokens=params.max_new_tokens,
        stop_token_ids=list(params.stop_ids),
        seed=derive_seed("generate", params.seed, index) if params.temperature > 0 else None,
        logprobs=0,
        detokenize=False,
    )


def _stop_reason(finish_reason: str | None) -> StopReason:
    if finish_reason == "stop":
        return "stop"
    if finish_reason == "length":
        return "length"
    raise GenerationError(f"vLLM ended a request with {finish_reason!r}")


class _Progress(tqdm):  # type: ignore[type-arg]
    """The bar that vLLM moves for each finished request; shows nothing and tells a listener."""

    _listener: OnFinished

    @staticmethod
    def reporting_to(listener: OnFinished) -> type["_Progress"]:
        return type("_ListenedProgress", (_Progress,), {"_listener": staticmethod(listener)})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bar_format": "", "file": _Nowhere()})

    def __iter__(self) -> Iterator[Any]:
        """vLLM also goes through the requests with a bar when it takes them in; that one must tell nobody."""
        return iter(self.iterable)

    def update(self, n: float | None = 1) -> bool | None:
        self._listener(int(n or 0))
        return super().update(n)


class _Nowhere:
    """A text stream that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None
