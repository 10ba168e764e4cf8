"""The real vLLM on a tiny model, in a worker as an evaluation runs it."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lib.cluster.group import Deadlines
from lib.cluster.local import LocalGroup
from lib.config.parallel import ClusterShape
from lib.config.vocabulary import VocabularyConfig
from lib.core.errors import GenerationError
from lib.evals.workers import EnginePool, EngineWorker
from lib.models.vocabulary import extend_model
from lib.rollout.engine import engine_environment
from lib.rollout.types import SamplingParams
from lib.train.environment import cpu_environment
from tests.tiny import VOCAB_SIZE, tiny_model

MAX_LEN = 96
PROMPTS = [[1, 80 + index, 90, 17 * index % 300 + 3, 5][: 3 + index % 3] for index in range(24)] + [[1, *range(10, 60)]]
GREEDY = SamplingParams(max_new_tokens=24, stop_ids=(2,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 7 added tokens, so that vLLM's embedding has padding too."""
    source, folder = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("grown")
    tiny_model(source, head_dim=32)  # the smallest that vLLM takes on CPU
    values = {"special": ["<|a|>"], "ranges": [{"pattern": "<item_{}>", "count": 6}]}
    extend_model(source, VocabularyConfig.parse(values, where="test"), folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[EnginePool]:
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)
    env = cpu_environment(1) | engine_environment()
    with LocalGroup(EngineWorker, shape, env=env, deadlines=Deadlines(), process_group=False) as group:
        pool = EnginePool(group, 240.0)
        pool.open(folder, "digest-of-the-policy", dtype="float32", max_len=MAX_LEN, kv_cache_gib=0.0625)
        yield pool


def _logprobs(reference: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits / temperature, dim=-1)


SLOW_INTAKE = """
from lib.rollout.vllm_engine import _Progress
heard = []
bar = _Progress.reporting_to(heard.append)
assert list(bar([1, 2, 3], mininterval=0.0, miniters=1)) == [1, 2, 3] and heard == []
bar(total=3).update(2)
assert heard == [2]
"""


def test_requests_count_when_they_are_finished_and_not_when_they_are_taken_in() -> None:
    """vLLM goes through its prompts with the same kind of bar, which moves where that takes long. Apart, for vLLM's import."""
    environment = {**os.environ, **engine_environment()}
    subprocess.run([sys.executable, "-c", SLOW_INTAKE], env=environment, check=True, timeout=240)


def test_greedy_tokens_and_their_log_probabilities_are_transformers(engines: EnginePool, reference: PreTrainedModel) -> None:
    """[G3] Every token is the most probable one after what came before, and carries its own log-probability."""
    finished: list[int] = []
    generations = engines.generate(PROMPTS, GREEDY, finished.append)
    assert sum(finished) == len(PROMPTS)
    for prompt, generation in zip(PROMPTS, generations):
        assert list(generation.prompt_ids) == prompt
        assert generation.policy_digest == "digest-of-the-policy"
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=2,
        )[0, len(prompt) :].tolist()
        assert list(generation.token_ids) == expected
        table = _logprobs(reference, prompt + expected)
        for position, (token_id, logprob) in enumerate(zip(expected, generation.logprobs), start=len(prompt) - 1):
            assert logprob == pytest.approx(table[position, token_id].item(), abs=1e-4)


def test_generation_ends_with_a_stop_token_or_at_the_limit(engines: EnginePool) -> None:
    """[D7] Any id may be a stop id; the one that ended a generation is its last token and stands nowhere else in it."""
    first = engines.generate(PROMPTS, GREEDY)
    stops = tuple(sorted({generation.token_ids[3] for generation in first}))
    for generation in engines.generate(PROMPTS, SamplingParams(max_new_tokens=24, stop_ids=stops)):
        assert generation.stop_reason == "stop"
        assert generation.token_ids[-1] in stops
        assert not set(generation.token_ids[:-1]) & set(stops)
        assert len(generation.logprobs) == len(generation.token_ids) <= 4
    cut = engines.generate(PROMPTS[:3], SamplingParams(max_new_tokens=2, stop_ids=()))
    assert [(generation.stop_reason, len(generation.token_ids)) for generation in cut] == [("length", 2)] * 3


def test_sampling_is_seeded_and_its_log_probabilities_are_of_what_was_sampled_from(
    engines: EnginePool, reference: PreTrainedModel
) -> None:
    """Log-probabilities are after the temperature; the same seed gives the same tokens, another one others."""
    params = SamplingParams(max_new_tokens=12, stop_ids=(2,), temperature=0.7, seed=3)
    drawn = engines.generate([PROMPTS[0]] * 6, params)
    assert [generation.token_ids for generation in engines.generate([PROMPTS[0]] * 6, params)] == [g.token_ids for g in drawn]
    assert len({generation.token_ids for generation in drawn}) > 1
    other = SamplingParams(max_new_tokens=12, stop_ids=(2,), temperature=0.7, seed=4)
    assert [generation.token_ids for generation in engines.generate([PROMPTS[0]] * 6, other)] != [g.token_ids for g in drawn]
    for generation in drawn:
        table = _logprobs(reference, [*PROMPTS[0], *generation.token_ids], temperature=0.7)
        expected = [table[len(PROMPTS[0]) - 1 + index, token].item() for index, token in enumerate(generation.token_ids)]
        assert math.fsum(abs(left - right) for left, right in zip(expected, generation.logprobs)) < 1e-3


def test_every_id_can_be_sampled_and_padding_of_the_embedding_never(engines: EnginePool) -> None:
    """[D6] Thousands of draws at vLLM's highest temperature: the added ids come up, the 57 rows of zeros after them never,
    though their logit would be as great as many others'."""
    params = SamplingParams(max_new_tokens=80, stop_ids=(), temperature=2.0, seed=5)
    drawn = [token for generation in engines.generate([[1, 5, 9]] * 128, params) for token in generation.token_ids]
    assert len(drawn) > 5_000  # some end at the end token
    assert max(drawn) < VOCAB_SIZE + 7
    assert set(range(VOCAB_SIZE, VOCAB_SIZE + 7)) <= set(drawn)


def test_no_prompts_no_generations(engines: EnginePool) -> None:
    assert engines.generate([], GREEDY) == []


def test_a_killed_engine_is_a_failure_and_not_an_answer(engines: EnginePool) -> None:
    """[G15] SIGKILL while it serves: an infrastructure error that names the rank, at once. Runs last: the engine is gone."""
    workers = [child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 1

    def kill(_: int) -> None:
        if psutil.pid_exists(workers[0]):
            os.kill(workers[0], signal.SIGKILL)

    staggered = [prompt for prompt in PROMPTS for _ in range(8)]
    with pytest.raises(GenerationError, match=r"engine failed: rank 0 of 1 .*killed by signal SIGKILL"):
        for _ in range(50):
            engines.generate(staggered, GREEDY, kill)
