"""`python -m tests.families`: every family from end to end: fine-tune a small random model of it, export, read it elsewhere.

The model has the family's real tokenizer, where one can be had, and few, narrow layers. It is admitted, trained for some steps
on the quickstart's questions and exported, with all weights trained and with adapters; the export's logits, continuations
and log-probabilities are then compared with transformers' and vLLM's, and an adapter's logits, in transformers and peft,
with those of the merged weights [E5]; where a family has experts, the share of tokens and layers that vLLM's routers send to
other experts than ours [E6]. Prints one JSON object: per family what `make verify-model` prints, and the losses.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lib.cluster.local import LocalGroup
from lib.config.model import LoraConfig
from lib.config.recipes import SftJob
from lib.core.artifact import read_manifest, stage_artifact
from lib.data.rows import ingest_dataset
from lib.models.admit import admit_model
from lib.models.decoder import Decoder
from lib.models.hf_io import load_full, read_spec
from lib.models.logit_report import read_logit_report, write_logit_report
from lib.models.verify import build_logit_report
from lib.models.verify_configs import DRAWS, randomise
from lib.recipes.sft import run_sft
from lib.recipes.verify_model import LOGPROB_LIMIT, check_model
from lib.tokens.tokenizer import Tokenizer
from lib.train.meters import METRICS_NAME, read_rows
from lib.train.run import RunInputs
from tests.adapter_engine import engine_difference
from tests.lib.models.adapters import all_targets
from tests.routing_engine import routing_engine, routing_mismatch

ASSETS = Path(".quickstart")
SMOLLM2, QWEN3 = ASSETS / "smollm2", ASSETS / "tokenizers" / "qwen3"
GEMMA3, GPT_OSS = ASSETS / "tokenizers" / "gemma3", ASSETS / "tokenizers" / "gpt_oss"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DATE = "2026-01-01"
ADAPTER_LIMIT = 1e-5


@dataclass(frozen=True)
class Small:
    """A small model of a family: numbers beside SHARED, its tokenizer, and how conversations become text."""

    tokenizer: Path
    numbers: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    not_in_vllm: tuple[str, ...] = ("embed", "head")
    """Targets of adapters that vLLM's model of the family doesn't take."""


SHARED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
SMALL: dict[str, Small] = {
    "llama": Small(SMOLLM2, {"tie_word_embeddings": True}, not_in_vllm=()),
    "mistral": Small(SMOLLM2, {"sliding_window": 32}),
    "olmo2": Small(SMOLLM2),
    "qwen2": Small(QWEN3, {"tie_word_embeddings": True}),
    "qwen3": Small(QWEN3, {"tie_word_embeddings": True}),
    "qwen3_moe": Small(QWEN3, {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}),
    "gemma3_text": Small(GEMMA3, {"num_hidden_layers": 6, "sliding_window": 32, "query_pre_attn_scalar": 32}),
    "gpt_oss": Small(
        GPT_OSS,
        {**EXPERTS, "num_local_experts": 4, "sliding_window": 32},
        {"chat_format": "harmony", "template_date": DATE},
    ),
}


def write_model(family: str, folder: Path) -> None:
    """A random float32 model of the family with its tokenizer, as a Hugging Face folder."""
    small, draw = SMALL[family], DRAWS[family]
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (small.tokenizer / name).is_file():
            shutil.copyfile(small.tokenizer / name, folder / name)
    tokenizer = Tokenizer.load(folder)
    config = draw.config_class(**SHARED | small.numbers, vocab_size=(tokenizer.vocab_size + 63) // 64 * 64)
    config.architectures = [draw.model_class.__name__]
    model = draw.model_class(config).float()
    config.save_pretrained(folder)
    randomise(model, read_spec(folder)[1], torch.Generator().manual_seed(0))
    model.save_pretrained(folder)


def make_job(family: str, steps: int, *, lora: LoraConfig | None) -> SftJob:
    values = {
        "learning_rate": 1e-3,
        "steps": steps,
        "sequence_length": 256,
        "nodes": 1,
        "gpus_per_node": 0,
        "config": {
            "data": {"num_streams": 2, **SMALL[family].data},
            "model": {"compute_dtype": "float32", "lora": lora and lora.model_dump(mode="json")},
            "optim": {"warmup_steps": 2},
            "train": {"rows_per_step": 4, "rows_per_micro_batch": 2},
            "cluster": {"cpu_ranks_per_node": 1, "threads_per_rank": 1},
            "tracking": {"mlflow": False},
        },
    }
    return SftJob.parse(values, where="job")


def run_family(family: str, root: Path, steps: int, *, what: str) -> dict[str, Any]:
    """What the check of the trained export found, and the first and last loss."""
    write_model(family, root / "folder")
    with stage_artifact(root / "model", "model") as staged:
        admit_model(root / "folder", staged)
    with stage_artifact(root / "data", "dataset") as staged:
        ingest_dataset(ASSETS / "chain_sum" / "train.jsonl", staged)
    spec = read_spec(root / "model")[1]
    targets = tuple(target for target in all_targets(spec) if target not in SMALL[family].not_in_vllm)
    lora = LoraConfig(rank=8, dropout=0.05, targets=targets) if what == "lora" else None
    with stage_artifact(root / "report", "logit_report") as staged:
        write_logit_report(build_logit_report(root / "model", num_configs=2), read_manifest(root / "model").digest, staged)
    with stage_artifact(root / "checkpoint", "checkpoint") as out:
        inputs = RunInputs(root / "model", root / "data", read_logit_report(root / "report"), root / "run")
        job = make_job(family, steps, lora=lora)
        run_sft(job, inputs, out, group_factory=LocalGroup, progress=lambda count, **figures: None)
    losses = [row["loss"] for row in read_rows(root / "run" / METRICS_NAME)]
    (root / "export").mkdir()
    check = check_model(root / "checkpoint" / "hf", root / "export", group_factory=LocalGroup, num_configs=0)
    found = {**check.to_json(), "steps": steps, "loss_first": losses[0], "loss_last": losses[-1]}
    if spec.moe is not None and lora is None:
        with routing_engine(root / "checkpoint" / "hf") as group:
            found |= routing_mismatch(load_decoder(root / "checkpoint" / "hf"), group)
    if lora is not None:
        found |= {"problems": list(check.problems), **check_adapter(root / "model", root / "checkpoint", lora)}
        for figure, limit in (("adapter_logit_diff", ADAPTER_LIMIT), ("vllm_adapter_diff", LOGPROB_LIMIT)):
            if not found.get(figure, 0.0) <= limit:
                found["problems"].append(f"{figure} is {found[figure]:.3g} > {limit}")
    return found


def check_adapter(model: Path, checkpoint: Path, lora: LoraConfig) -> dict[str, float]:
    """The adapter on its base against the merged weights: in transformers and peft, and in vLLM, which on CPU has no adapters
    of experts."""
    found = {"adapter_logit_diff": adapter_difference(model, checkpoint)}
    if read_spec(model)[1].moe is None:
        decoder = load_decoder(checkpoint / "hf")
        found["vllm_adapter_diff"] = engine_difference(decoder, model, checkpoint / "adapter", max_rank=lora.rank)
    return found


def load_decoder(folder: Path) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    return decoder


@torch.no_grad()
def adapter_difference(model: Path, checkpoint: Path) -> float:
    """Greatest difference of the logits of the adapter on its base from those of the merged weights, of the greatest logit."""
    token_ids = torch.arange(5, 69)[None]
    merged, base = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for folder in (checkpoint / "hf", model)
    )
    expected = merged(token_ids, use_cache=False).logits
    adapted = PeftModel.from_pretrained(base, checkpoint / "adapter").eval()(token_ids, use_cache=False).logits
    return float((adapted - expected).abs().max() / expected.abs().max())


def main() -> int:
    """0 when every family came through without a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--family", nargs="*", default=list(SMALL), choices=list(SMALL))
    parser.add_argument("--what", nargs="*", default=["full", "lora"], choices=["full", "lora"], help="what is trained")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for family, what in itertools.product(options.family, options.what):
        name = f"{family}, {what}"
        with tempfile.TemporaryDirectory(prefix=f"postflyte-{family}-") as scratch:
            try:
                found[name] = run_family(family, Path(scratch), options.steps, what=what)
            except Exception as error:  # noqa: BLE001 - whatever a library raises, the other families are still tried
                found[name] = {"problems": [f"{type(error).__name__}: {error}"]}
        sys.stderr.write(f"{name}: {json.dumps(found[name])}\n")
    sys.stdout.write(json.dumps({"families": found}) + "\n")
    return int(any(result["problems"] for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
