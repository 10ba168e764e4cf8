"""What packing in the background saves: stalls beside synchronous packing, and packed against padded training.

`python -m benchmarks overlap [--steps 60] [--documents 64] [--rounds 2] [--tokenizer FOLDER]`

Stall: a device that is busy as long as the producer needs for a step (measured first), simulated by waiting, as a GPU
would; the share of the time that the loop waits for its batch, prepared between the steps, in a thread, in a process.
Packed against padded: tokens that are no padding per CPU second, forward and backward of a small decoder, one thread, on the
most skewed lengths of the packing benchmark; padded to the longest document of a micro-batch of 8 and of 32, one document a
row. The ideal is the ratio of the slots that each lays out for the same documents.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.floor import measure_floor
from benchmarks.packing import lengths_of
from benchmarks.report import Report, interleaved_cpu_seconds, medians, say
from benchmarks.stream import CONFIG, ROWS_PER_STEP, SEQUENCE_LENGTH, TOKENIZER, write_rows
from lib.core.manifest import Json
from lib.data.batch import collate
from lib.data.document import Document, PackedRow
from lib.data.feed import ChatFeed
from lib.data.packing import plan_packs
from lib.data.prefetch import Prefetcher
from lib.data.stream import StepRows
from lib.models.decoder import Decoder
from lib.models.spec import DecoderSpec, Rope
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from lib.train.step import LossModule, MicroBatch

SKEWED, CAPACITY = "zipf", 2048
PADDED_MICRO_BATCHES = (8, 32)
SPEC = DecoderSpec(
    family="llama",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=CAPACITY,
    rope=Rope(1e4),
    norm_eps=1e-5,
    tied=True,
)


def stalls(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Way of preparing -> share of the time that the loop stalled, and seconds of a step."""
    write_rows(folder / "rows.jsonl", options.rows)
    encoder = ChatEncoder(Tokenizer.load(options.tokenizer))
    ways: dict[str, Json] = {
        "synchronous": {"workers": 0},
        "thread": {"workers": 1},
        "process": {"workers": 1, "worker_kind": "process"},
    }

    def feed(change: Json) -> Prefetcher[Any]:
        config = CONFIG.model_copy(update=change)
        chats = ChatFeed(config, str(folder / "rows.jsonl"), str(options.tokenizer), SEQUENCE_LENGTH, ROWS_PER_STEP)
        depth = config.prefetch_batches if config.workers else 0
        return Prefetcher(chats.producers(encoder, rank=0, num_ranks=1), _prepare, depth)

    with feed(ways["synchronous"]) as plain:
        for _ in range(options.warm_up):
            plain.next_step()
        before = plain.stall_seconds
        for _ in range(options.steps):
            plain.next_step()
        seconds = (plain.stall_seconds - before) / options.steps
    say(f"the producer needs {seconds * 1e3:.1f} ms a step; so does the device")
    return {name: _stall(feed(change), options, seconds) for name, change in ways.items()}


def _prepare(step: StepRows) -> MicroBatch:
    return MicroBatch.of(collate(step.rows, SEQUENCE_LENGTH, 0))


def _stall(feed: Prefetcher[Any], options: argparse.Namespace, step_seconds: float) -> dict[str, float]:
    with feed:
        for _ in range(options.warm_up):
            feed.next_step()
            time.sleep(step_seconds)
        waited, start = feed.stall_seconds, time.perf_counter()
        for _ in range(options.steps):
            feed.next_step()
            time.sleep(step_seconds)
        total = time.perf_counter() - start
        return {"stall_share": (feed.stall_seconds - waited) / total, "step_seconds": total / options.steps}


def documents(num_documents: int) -> list[Document]:
    """Random tokens of the most skewed lengths."""
    source = np.random.default_rng(0)
    lengths = np.maximum(2, lengths_of(SKEWED, num_documents, CAPACITY))
    tokens = [source.integers(0, SPEC.vocab_size, length).astype(np.int32) for length in lengths.tolist()]
    return [Document(f"d{number}", ids, np.ones(len(ids), np.bool_)) for number, ids in enumerate(tokens)]


def packed(found: Sequence[Document]) -> Iterator[MicroBatch]:
    """Rows of the capacity, one a micro-batch."""
    lengths = np.array([len(document.token_ids) for document in found])
    plan = plan_packs(lengths, CAPACITY, open_packs=16, max_delay=1024)
    for start, stop in zip(plan.offsets[:-1].tolist(), plan.offsets[1:].tolist()):
        row = PackedRow(tuple(found[index] for index in plan.order[start:stop].tolist()))
        yield MicroBatch.of(collate([row], CAPACITY, 0))


def padded(found: Sequence[Document], size: int) -> Iterator[MicroBatch]:
    """Micro-batches of `size` documents in their order, as long as the longest."""
    for start in range(0, len(found), size):
        rows = [PackedRow((document,)) for document in found[start : start + size]]
        yield MicroBatch.of(collate(rows, max(row.num_tokens for row in rows), 0))


def training(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Way of laying out -> tokens that are no padding per CPU second, and slots for each of them."""
    torch.manual_seed(0)
    module = LossModule(Decoder(SPEC), chunk_tokens=256)
    found = documents(options.documents)
    ways = {"packed": list(packed(found))} | {f"padded_{size}": list(padded(found, size)) for size in PADDED_MICRO_BATCHES}

    def run(batches: Sequence[MicroBatch]) -> Callable[[], None]:
        def train() -> None:
            for micro in batches:
                module.zero_grad(set_to_none=True)
                batch = micro.batch
                loss, _ = module(batch.token_ids, batch.positions, batch.labels, micro.layout)
                (loss / batch.num_targets).backward()

        return train

    run(ways["packed"])()
    seconds = medians(interleaved_cpu_seconds({name: run(batches) for name, batches in ways.items()}, rounds=options.rounds))
    num_tokens = sum(len(document.token_ids) for document in found)
    return {
        name: {
            "tokens_per_cpu_s": num_tokens / seconds[name],
            "slots_per_token": sum(micro.batch.token_ids.numel() for micro in batches) / num_tokens,
        }
        for name, batches in ways.items()
    }


def main(arguments: Sequence[str]) -> None:
    """Measure both and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks overlap")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    options = parser.parse_args(arguments)
    floor = measure_floor()
    with tempfile.TemporaryDirectory(prefix="postflyte-overlap-") as name:
        waits = stalls(options, Path(name))
    rates = training(options)
    report = Report("overlap", details={"options": {**vars(options), "tokenizer": str(options.tokenizer)}, "lengths": SKEWED})
    report.ours = {
        "stall_share_thread": waits["thread"]["stall_share"],
        "stall_share_process": waits["process"]["stall_share"],
        "stall_within_3_percent": float(min(waits[way]["stall_share"] for way in ("thread", "process")) <= 0.03),
        **rates["packed"],
    }
    report.peers = {
        "synchronous": waits["synchronous"],
        **{f"padded_{size}": rates[f"padded_{size}"] for size in PADDED_MICRO_BATCHES},
    }
    report.targets = {"stall_within_3_percent": 1.0}
    for size in PADDED_MICRO_BATCHES:
        report.compare("tokens_per_cpu_s", f"padded_{size}", smaller_is_better=False)
        ideal = rates[f"padded_{size}"]["slots_per_token"] / rates["packed"]["slots_per_token"]
        report.details[f"ideal_vs_padded_{size}"] = ideal
        share = f"share_of_ideal_vs_padded_{size}"
        report.ours[share] = report.ratios[f"tokens_per_cpu_s_vs_padded_{size}"] / ideal
        report.targets[share] = 0.9
    report.print(floor)
