"""Many ranks against one process, on real processes of this machine: is it the same step, what does each rank read and hold,
and how fast are two.

`python -m benchmarks dist [--tokens 2048] [--step-tokens 4096] [--rounds 3] [--variants fsdp,tensor]
[--skip-speed]`

Same: loss and every gradient of a step, from a checkpoint on disk, in float32, on 1, 2 and 4 ranks (gloo; no GPU), for a
dense decoder of 31 M weights and one of experts, both with biases, against one plain process that shards nothing; the
difference is relative to the greatest entry of each gradient, the limit 1e-5. Bytes read are those of tensor data, against a
rank's share of the checkpoint: all of it, divided by the ranks that hold one copy together. Peak memory is what a rank's
process grew by while it loaded, took a step with AdamW and updated.

Speed: weak scaling. One rank with one thread and two ranks with one thread each take steps of the same number of tokens a
rank, in turns; efficiency is tokens per second of the two over twice those of the one. Two processes that don't talk to each
other, at the same time, show what the machine itself takes from two busy cores.
"""

import argparse
import gc
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.ranks import CHUNK_TOKENS, CPU, DEADLINE_SECONDS, VOCAB_SIZE, DistWorker, local_shape, share
from benchmarks.report import Report, say
from lib.cluster.group import Deadlines
from lib.cluster.local import LocalGroup
from lib.models.decoder import Decoder
from lib.models.families import family_of
from lib.models.hf_io import CheckpointReader, load_full, read_spec
from lib.models.verify_configs import DRAWS, randomise
from lib.train.step import LossModule, NextToken, accumulate_gradients

LIMIT, BYTES_LIMIT = 1e-5, 1.1
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "experts": (
        "gpt_oss",
        {
            **SIZES,
            "hidden_size": 256,
            "head_dim": 32,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "tie_word_embeddings": False,
        },
    ),
}


@dataclass(frozen=True)
class Variant:
    """A mesh on a number of ranks."""

    name: str
    num_ranks: int
    parallel: dict[str, int]
    models: tuple[str, ...] = ("dense", "experts")


VARIANTS = (
    Variant("one", 1, {}),
    Variant("fsdp", 2, {}),
    Variant("hsdp", 2, {"replicate": 2}),
    Variant("tensor", 2, {"tensor": 2}),
    Variant("fsdp", 4, {}),
    Variant("hsdp", 4, {"replicate": 2}),
    Variant("tensor", 4, {"tensor": 4}),
    Variant("2d", 4, {"tensor": 2}),
    Variant("2d", 4, {"tensor": 2, "replicate": 2}),
    Variant("expert", 2, {"expert": 2}, ("experts",)),
    Variant("expert", 4, {"expert": 4}, ("experts",)),
    Variant("expert", 4, {"expert": 2}, ("experts",)),
)


def write_model(folder: Path, name: str) -> None:
    """Random everywhere: weights, biases, norms and sinks."""
    family, numbers = MODELS[name]
    draw = DRAWS[family]
    config = draw.config_class(**numbers)
    config.architectures = [draw.model_class.__name__]
    as_json = json.loads(config.to_json_string(use_diff=False))
    model = draw.model_class(config)
    randomise(model, family_of(as_json).spec_from_config(as_json), torch.Generator().manual_seed(0))
    model.save_pretrained(folder)


def reference(folder: Path, num_tokens: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one plain process, all rows in one batch."""
    decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    module = LossModule(decoder, CHUNK_TOKENS)
    micro = share(num_tokens, 1, 0)
    num_targets = sum(batch.batch.num_targets for batch in micro)
    sums = accumulate_gradients(module, micro, NextToken(), divisors={"loss": float(num_targets)}, device=CPU)
    return sums["loss"], {name: tensor.grad for name, tensor in module.named_parameters() if tensor.grad is not None}


def compare(variant: Variant, folder: Path, options: argparse.Namespace, expected: Any) -> dict[str, Any]:
    """What a variant's ranks did beside the reference."""
    out = folder / "gradients.safetensors"
    with LocalGroup(DistWorker, local_shape(variant.num_ranks), env={"OMP_NUM_THREADS": "1"}, deadlines=Deadlines()) as group:
        arguments = (str(folder), variant.parallel, options.tokens, str(out))
        ranks = group.call("step", *arguments, deadline_seconds=DEADLINE_SECONDS)
    gradients, (loss, wanted) = load_file(out), expected
    differences = {name: float((gradients[name] - grad).abs().max() / grad.abs().max()) for name, grad in wanted.items()}
    reader = CheckpointReader(folder)
    stored = sum(reader.get(name).nbytes for name in reader.names())
    holders = variant.num_ranks // variant.parallel.get("replicate", 1)
    worst = max(differences, key=lambda name: differences[name])
    return {
        "loss_difference": abs(sum(rank["loss"] for rank in ranks) - loss) / abs(loss),
        "gradient_difference": differences[worst] if gradients.keys() == wanted.keys() else math.inf,
        "worst_gradient": worst,
        "bytes_read_of_share": max(rank["bytes_read"] for rank in ranks) * holders / stored,
        "peak_mib": round(max(rank["peak_bytes"] for rank in ranks) / 2**20, 1),
    }


def all_variants(folders: dict[str, Path], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found = {}
    for model, folder in folders.items():
        expected = reference(folder, options.tokens)
        for variant in VARIANTS:
            if model in variant.models and variant.name in ("one", *options.variants.split(",")):
                shown = ", ".join(f"{axis} {size}" for axis, size in variant.parallel.items())
                name = f"{model} {variant.name} on {variant.num_ranks}" + (f" ({shown})" if shown else "")
                found[name] = compare(variant, folder, options, expected)
                say(f"  {name}: {found[name]}")
                gc.collect()
    return found


def speeds(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Median [wall, CPU] seconds of a step of one rank, of two together, of two that don't know of each other, and of two on
    each layer, which have the rows of one."""
    seconds: dict[str, list[list[float]]] = {}
    for sizes, names in (({"one": 1, "beside": 1, "two": 2}, ("one", "apart", "two")), ({"tensor": 2}, ("tensor",))):
        with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
            groups = {name: stack.enter_context(_loaded(folder, name, size, options)) for name, size in sizes.items()}
            for number in range(options.rounds + 1):
                for name in names if number % 2 else names[::-1]:
                    together = [groups["one"], groups["beside"]] if name == "apart" else [groups[name]]
                    ranks = [rank for group in threads.map(_timed_step, together) for rank in group]
                    if number:  # the first step allocates
                        seconds.setdefault(name, []).append([max(wall for wall, _ in ranks), max(cpu for _, cpu in ranks)])
                        say(f"  round {number}/{options.rounds} {name}: {seconds[name][-1][0]:.2f} s")
    return {name: [statistics.median(column) for column in zip(*rounds)] for name, rounds in seconds.items()}


def _loaded(folder: Path, name: str, num_ranks: int, options: argparse.Namespace) -> LocalGroup:
    group = LocalGroup(DistWorker, local_shape(num_ranks), env={"OMP_NUM_THREADS": "1"}, deadlines=Deadlines())
    parallel = {"tensor": 2} if name == "tensor" else {}
    group.call("load", str(folder), parallel, options.step_tokens, True, deadline_seconds=DEADLINE_SECONDS)
    return group


def _timed_step(group: LocalGroup) -> list[list[float]]:
    ranks: list[list[float]] = group.call("timed_step", deadline_seconds=DEADLINE_SECONDS)
    return ranks


def main(arguments: Sequence[str]) -> None:
    """Compare, time, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks dist")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--step-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(dict.fromkeys(variant.name for variant in VARIANTS)))
    parser.add_argument("--skip-speed", action="store_true")
    options = parser.parse_args(arguments)
    report = Report("dist")
    with tempfile.TemporaryDirectory(prefix="postflyte-dist-") as scratch:
        folders = {name: Path(scratch) / name for name in MODELS}
        for name, folder in folders.items():
            write_model(folder, name)
        found = all_variants(folders, options)
        seconds = {} if options.skip_speed else speeds(folders["dense"], options)
    same = [max(case["loss_difference"], case["gradient_difference"]) for case in found.values()]
    report.ours = {
        "variants": float(len(found)),
        "greatest_difference": max(same),
        "same_step": float(max(same) <= LIMIT),
        "bytes_read_of_share": max(case["bytes_read_of_share"] for case in found.values()),
        "bytes_read_within_limit": float(all(case["bytes_read_of_share"] <= BYTES_LIMIT for case in found.values())),
    }
    report.targets = {"same_step": 1.0, "bytes_read_within_limit": 1.0}
    if seconds:
        walls = {name: wall for name, (wall, _) in seconds.items()}
        report.ours |= {
            "tokens_per_s_one_rank": options.step_tokens / walls["one"],
            "tokens_per_s_two_ranks": 2 * options.step_tokens / walls["two"],
            "two_rank_efficiency": walls["one"] / walls["two"],
            "two_rank_efficiency_of_what_the_machine_allows": walls["apart"] / walls["two"],
            "two_rank_efficiency_by_cpu_time": seconds["one"][1] / seconds["two"][1],
            "tensor_efficiency": walls["one"] / walls["tensor"] / 2,
        }
        report.targets["two_rank_efficiency"] = 0.85
    report.details = {"variants": found, "step_seconds": seconds, "options": vars(options)}
    report.print()
