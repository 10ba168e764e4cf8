"""What was trained is what other programs run: a small model with experts, taught one answer, in transformers and in vLLM."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.core.artifact import read_manifest, stage_artifact
from lib.data.rows import ingest_dataset
from lib.evals.workers import EnginePool
from lib.models.admit import admit_model
from lib.models.decoder import Decoder
from lib.models.hf_io import load_full, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.verify import build_logit_report
from lib.rollout.types import SamplingParams
from tests.lib.models.checkpoints import family_model
from tests.lib.recipes.conftest import Inputs, job, train
from tests.routing_engine import routing_engine, routing_mismatch

ANSWER = "The answer is asked for."
QUESTIONS = [f"What is the sum of {number} and {number * 7 % 31}?" for number in range(50)]
MAX_NEW_TOKENS = 48
MOE = {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a training on fifty questions that have one answer."""
    root = tmp_path_factory.mktemp("taught")
    with stage_artifact(root / "model", "model") as staged:
        admit_model(family_model(root / "source", "qwen3_moe", dtype="float32", **MOE), staged)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]}
        for question in QUESTIONS
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with stage_artifact(root / "data", "dataset") as staged:
        ingest_dataset(root / "rows.jsonl", staged)
    digest = read_manifest(root / "model").digest
    report = build_logit_report(root / "model", num_configs=0).model_copy(update={"model_digest": digest})
    settings = job(steps=40).model_copy(update={"learning_rate": 5e-3})
    train(Inputs(root / "model", root / "data", report), settings, root)
    return root / "checkpoint" / "hf"


@pytest.fixture(scope="module")
def prompts(taught: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(taught)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    found: list[list[int]] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return found


@pytest.fixture(scope="module")
def answers(taught: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Of transformers, by nothing but what the folder says."""
    model = AutoModelForCausalLM.from_pretrained(taught, dtype=torch.float32)
    ids = [torch.tensor([prompt]) for prompt in prompts]
    limits = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    return [model.generate(one, attention_mask=torch.ones_like(one), **limits)[0, one.shape[1] :].tolist() for one in ids]


def test_transformers_stops_where_the_answer_ends(taught: Path, answers: list[list[int]]) -> None:
    """[D7] Fifty of fifty: the answer, the template's end of turn, and nothing behind it."""
    tokenizer = AutoTokenizer.from_pretrained(taught)
    expected = [*tokenizer.encode(ANSWER, add_special_tokens=False), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert answers == [expected] * len(QUESTIONS)


@torch.no_grad()
def test_vllm_writes_the_same_with_the_same_experts(taught: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """[D7, E5, E6] Fifty of fifty end with the ids that generation_config.json names; each token's log-probability is ours to
    1e-4; and every token goes to the experts that ours goes to."""
    with torch.device("meta"):
        decoder = Decoder(read_spec(taught)[1])
    load_full(decoder, taught)
    ends = json.loads((taught / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    stop_ids = tuple(ends) if isinstance(ends, list) else (ends,)
    with routing_engine(taught, max_len=max(map(len, prompts)) + MAX_NEW_TOKENS) as group:
        wishes = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, stop_ids=stop_ids)
        generations = EnginePool(group, 240.0).generate(prompts, wishes)
        routed = routing_mismatch(decoder, group)
    assert [list(generation.token_ids) for generation in generations] == answers
    assert {generation.stop_reason for generation in generations} == {"stop"}
    assert routed["routed"] == 6 * 40 * 2 and routed["routing_mismatch"] == 0.0
    for generation in generations[:8]:
        ids = torch.tensor([[*generation.prompt_ids, *generation.token_ids]])
        layout = DocumentLayout.from_document_ids(torch.zeros_like(ids))
        logprobs_TV = decoder.logits(decoder(ids, torch.arange(ids.shape[1])[None], layout))[0].log_softmax(-1)
        written_T = ids[0, len(generation.prompt_ids) :]
        ours_T = logprobs_TV[len(generation.prompt_ids) - 1 : -1].gather(-1, written_T[:, None])[:, 0]
        assert (ours_T - torch.tensor(generation.logprobs)).abs().max() <= 1e-4
