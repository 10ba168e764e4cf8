"""What every engine does, and the environment its process must be started in."""

from collections.abc import Callable, Sequence
from typing import Protocol

from lib.rollout.types import Generation, SamplingParams

OnFinished = Callable[[int], None]
"""Called with the number of generations finished since the last call."""


class Generator(Protocol):
    """Anything that continues prompts: an engine in this process, or a group of them behind one."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[Generation]:
        """One generation for each prompt, in order.

        Raises:
            GenerationError: the engine failed; there is no result to score.
        """
        ...


def engine_environment() -> dict[str, str]:
    """Variables that vLLM reads when it is imported, to be added to the CPU or GPU environment of a worker.

    In one process, since a group watches its workers and not their children; without compilation, which for one evaluation
    costs more than it saves; without usage reports; quiet but for errors.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }
