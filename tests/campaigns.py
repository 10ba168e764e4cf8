"""Laws tried at a size that the suite has no time for.

`python -m tests.campaigns packing [--lists 1000000]`: random length lists through the packer.
`python -m tests.campaigns memory [--rows 5000000]`: short rows streamed from a file, with one of 50 MB among them.
`python -m tests.campaigns invariance [--cases 1000]`: random cuts of a step on 1, 2 and 4 ranks against one plain process.
`python -m tests.campaigns checkpoints [--saves 200]`: four processes save into one folder, late by chance at each move.
`python -m tests.campaigns load [--layers 60]`: the memory of four ranks that load a model, by dtype and mesh.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from lib.config.data import DataConfig
from lib.core.examples import Completion
from lib.data.document import Document
from lib.data.examples import open_examples
from lib.data.mixture import OWN_DATA
from lib.data.packing import BestFitPacker, OpenPack
from lib.data.stream import Encoding, PackedStream
from tests.lib.parallel.load_memory import folder_of, load
from tests.lib.parallel.ranks import run_here, run_ranks
from tests.lib.train.mesh_work import race
from tests.numerics.invariance import broken_limits, check_cases, random_case


class PackingCase(NamedTuple):
    """A list of items and the packer it is given to."""

    capacity: int
    open_packs: int
    max_delay: int
    lengths: list[int]


def random_lists(num_lists: int, seed: int) -> Iterator[PackingCase]:
    """Lists of 0 to 12 items, with 1, the capacity and its neighbour common."""
    source = np.random.default_rng(seed)
    capacities, open_packs = source.integers(1, 65, num_lists), source.integers(1, 9, num_lists)
    max_delays, sizes = source.integers(1, 17, num_lists), source.integers(0, 13, num_lists)
    capacity_of = np.repeat(capacities, sizes)
    lengths = 1 + (source.random(sizes.sum()) ** 2 * capacity_of).astype(np.int64)
    special = np.stack([np.ones_like(lengths), capacity_of, np.maximum(1, capacity_of - 1)])
    choice = source.integers(0, 12, len(lengths))
    lengths = np.where(choice < 3, special[np.minimum(choice, 2), np.arange(len(lengths))], lengths)
    lists = np.split(np.minimum(lengths, capacity_of), np.cumsum(sizes)[:-1])
    for capacity, num_open, max_delay, part in zip(capacities.tolist(), open_packs.tolist(), max_delays.tolist(), lists):
        yield PackingCase(capacity, num_open, max_delay, part.tolist())


def check_packs(case: PackingCase) -> None:
    """The packs are a partition of the items, none over the capacity, room exact; bounded in number and in delay."""
    packer: BestFitPacker[int] = BestFitPacker(case.capacity, case.open_packs, case.max_delay)
    packs = []
    for ref, length in enumerate(case.lengths):
        packs += packer.add(length, ref)
        still_open: list[OpenPack[int]] = packer.open()
        assert len(still_open) <= case.open_packs
        assert all(ref - pack.refs[0] <= case.max_delay for pack in still_open)
    packs += packer.flush()
    assert sorted(ref for pack in packs for ref in pack.refs) == list(range(len(case.lengths)))
    for refs, num_free in packs:
        assert refs and case.capacity - sum(case.lengths[ref] for ref in refs) == num_free >= 0
        assert refs[-1] - refs[0] <= case.max_delay


def packing(num_lists: int) -> None:
    start = time.perf_counter()
    at_once = 50_000
    for done in range(0, num_lists, at_once):
        for case in random_lists(min(at_once, num_lists - done), seed=done):
            check_packs(case)
        print(f"{min(done + at_once, num_lists):,} lists, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"packing: {num_lists:,} random lists, no token lost, doubled or split, no pack over its capacity or kept too long")


LONG_ROW_CHARACTERS = 50_000_000
GROWTH_LIMIT = 0.05


def write_short_rows(path: Path, num_rows: int) -> None:
    """Completions of some ten characters; the one in the middle has LONG_ROW_CHARACTERS."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            text = "x" * LONG_ROW_CHARACTERS if number == num_rows // 2 else f"answer {number}"
            file.write(json.dumps({"id": f"r{number}", "prompt": f"row {number}", "completion": text}) + "\n")


def encode_bytes(rows: Sequence[Any]) -> list[Document]:
    """A token a byte; all are trained."""
    documents = []
    for row in rows:
        assert isinstance(row, Completion)
        token_ids = np.frombuffer((row.prompt + row.completion).encode(), np.uint8).astype(np.int32)
        documents.append(Document(row.sample_id, token_ids, np.ones(len(token_ids), np.bool_)))
    return documents


def stream_short_rows(path: Path, num_rows: int) -> tuple[int, int, int]:
    """(resident bytes after a tenth of the rows, at the end, rows dropped) of one pass over the rows."""
    source = open_examples(path, Completion, kind="completion")
    config = DataConfig(num_streams=4, long_rows="drop", shuffle_rows=256)
    encoding = Encoding(encode_bytes, {"tokenizer": "bytes"})
    stream = PackedStream({OWN_DATA: source}, encoding, config, sequence_length=1024, rows_per_step=16)
    process, warm, shown, visited = psutil.Process(), 0, 0, 0
    while visited < num_rows:
        stream.next_step()
        counts = [state["counts"] for state in stream.state()["streams"].values()]
        visited = sum(count["visited"] for count in counts)
        if not warm and visited >= num_rows // 10:
            warm = process.memory_info().rss
        if visited - shown >= num_rows // 10:
            shown = visited
            print(f"{visited:,} rows, {process.memory_info().rss >> 20} MiB", file=sys.stderr, flush=True)
    return warm, process.memory_info().rss, sum(count["dropped"] for count in counts)


def memory(num_rows: int) -> None:
    with tempfile.TemporaryDirectory(prefix="postflyte-memory-") as name:
        path = Path(name) / "rows.jsonl"
        write_short_rows(path, num_rows)
        warm, last, num_dropped = stream_short_rows(path, num_rows)
    growth = last / warm - 1
    print(f"memory: {num_rows:,} rows, {warm >> 20} MiB after a tenth of them, {last >> 20} MiB at the end ({growth:+.1%}); "
          f"{num_dropped} row of {LONG_ROW_CHARACTERS:,} characters dropped on the way")  # fmt: skip
    assert growth < GROWTH_LIMIT, f"grown by {growth:.1%}"
    assert num_dropped >= 1


def invariance(num_cases: int) -> None:
    """As many cases on each number of ranks; a start of the ranks takes a hundred."""
    start, at_once = time.perf_counter(), 100
    for num_ranks in (1, 2, 4):
        greatest = {"loss": 0.0, "float32": 0.0, "float64": 0.0}
        for first in range(0, num_cases, at_once):
            cases = [random_case(number) for number in range(first, min(first + at_once, num_cases))]
            values = [asdict(case) for case in cases]
            found = run_here(check_cases, values) if num_ranks == 1 else run_ranks(check_cases, num_ranks, values)[0]
            for case, differences in zip(cases, found, strict=True):
                broken = broken_limits(case, differences)
                assert not broken, f"{num_ranks} ranks, {case}: {'; '.join(broken)}"
                greatest["loss"] = max(greatest["loss"], differences["loss"])
                greatest[case.dtype] = max(greatest[case.dtype], differences["gradient"])
            print(
                f"{num_ranks} ranks: {first + len(cases)} cases, {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        print(
            f"invariance: {num_cases} cases on {num_ranks} rank{'s' * (num_ranks > 1)}; greatest difference: loss "
            f"{greatest['loss']:.1e}, gradients {greatest['float32']:.1e} in float32, {greatest['float64']:.1e} in float64",
            flush=True,
        )


def checkpoints(num_saves: int) -> None:
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as folder:
        ranks = run_ranks(race, 4, Path(folder), num_saves)
    growth = max(rank["growth"] for rank in ranks)
    assert growth < 0.02, f"resident memory grew by {growth:.1%}"
    print(
        f"checkpoints: 4 x {num_saves} saves into one folder, none failed; resident memory {growth:+.1%} after the first four"
    )


def loads(num_layers: int) -> None:
    with tempfile.TemporaryDirectory(prefix="loads-") as name:
        warm = folder_of(Path(name) / "warm", "float32", num_layers=1)
        for dtype in ("float32", "bfloat16"):
            folder = folder_of(Path(name) / dtype, dtype, num_layers=num_layers)
            for mesh in ({}, {"tensor": 2}, {"replicate": 2}):
                ranks = run_ranks(load, 4, str(warm), str(folder), mesh)
                most = max(rank["grown"] / (1.3 * rank["share"] + rank["file"]) for rank in ranks)
                mib = [f"{rank['grown'] / 2**20:.0f} for {rank['share'] / 2**20:.0f}" for rank in ranks]
                print(f"load: {dtype} {mesh}: MiB {', '.join(mib)}; {most:.2f} of the limit", flush=True)
                assert most <= 1.0
            shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns")
    commands = parser.add_subparsers(dest="name", required=True)
    commands.add_parser("packing").add_argument("--lists", type=int, default=1_000_000)
    commands.add_parser("memory").add_argument("--rows", type=int, default=5_000_000)
    commands.add_parser("invariance").add_argument("--cases", type=int, default=1000)
    commands.add_parser("checkpoints").add_argument("--saves", type=int, default=200)
    commands.add_parser("load").add_argument("--layers", type=int, default=60)
    options = parser.parse_args()
    if options.name == "packing":
        packing(options.lists)
    elif options.name == "memory":
        memory(options.rows)
    elif options.name == "checkpoints":
        checkpoints(options.saves)
    elif options.name == "load":
        loads(options.layers)
    else:
        invariance(options.cases)


if __name__ == "__main__":
    main()
