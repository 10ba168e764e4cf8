"""Packing: ours against TRL (bfd, wrapped) and a torchtune-style greedy, one thread, CPU time, same output fields.

`python -m benchmarks packing [--samples 100000] [--rounds 3] [--capacity 4096] [--open-packs 128] [--max-delay 1024]
[--token-bytes 4] [--cases lognormal_1.0 lognormal_1.5 lognormal_2.0 zipf]`; a million samples need about 16 GB of memory,
half of it with two-byte ids.

Each variant turns an Arrow table with one column `input_ids` into a table of packed rows: `input_ids` (the documents of
a row one after the other) and `seq_lengths` (their lengths). TRL's wrapped packing cuts documents and has no lengths.
`trl_bfd` is the public `pack_dataset` as shipped; `trl_bfd_kernel` is its inner function called on the same batches
without the `datasets` machinery, which is the stricter comparison.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import trl.data_utils
from trl import pack_dataset

from benchmarks.floor import measure_floor
from benchmarks.report import Report, interleaved_cpu_seconds, medians, say
from lib.data.packing import BestFitPacker, plan_packs

TRL_BATCH = 1000
"""Rows that `pack_dataset` packs together, its default."""
MEAN_TOKENS = 600
CASES = ("lognormal_1.0", "lognormal_1.5", "lognormal_2.0", "zipf")
PEERS = ("trl_bfd", "trl_bfd_kernel", "trl_wrapped", "torchtune_greedy")
TARGET_SPEED, TARGET_EFFICIENCY = 10.0, 0.998


def lengths_of(name: str, num_samples: int, capacity: int) -> np.ndarray:
    """[num_samples] int64 document lengths, 1 to `capacity`, the same every time."""
    source = np.random.default_rng(0)
    if name == "zipf":
        raw = source.zipf(1.5, num_samples) * source.uniform(16, 32, num_samples)
    else:
        sigma = float(name.removeprefix("lognormal_"))
        raw = source.lognormal(np.log(MEAN_TOKENS) - sigma**2 / 2, sigma, num_samples)
    return np.clip(raw, 1, capacity).astype(np.int64)


def pack_ours(table: pa.Table, capacity: int, open_packs: int, max_delay: int) -> pa.Table:
    """Ours over the whole table, the number of open packs and the delay bounded."""
    column = table.column("input_ids").chunk(0)
    lengths = pc.list_value_length(column).to_numpy()
    plan = plan_packs(lengths, capacity, open_packs, max_delay)
    return _rows(column, plan.order, plan.offsets)


def pack_greedy(table: pa.Table, capacity: int) -> pa.Table:
    """As torchtune's PackedDataset: documents in their order, a new row as soon as the next one doesn't fit."""
    column = table.column("input_ids").chunk(0)
    lengths = pc.list_value_length(column).to_numpy()
    offsets, filled = [0], 0
    for index, length in enumerate(lengths.tolist()):
        if filled + length > capacity:
            offsets.append(index)
            filled = 0
        filled += length
    return _rows(column, np.arange(len(lengths)), np.array([*offsets, len(lengths)]))


def _rows(column: pa.LargeListArray, order: np.ndarray, offsets: np.ndarray) -> pa.Table:
    """Gather documents in `order`, cut into rows at `offsets`: whole documents are copied, not token by token."""
    kind = column.type.value_type
    begins = column.offsets.to_numpy()
    lengths = np.diff(begins)[order]
    ends = np.concatenate(([0], np.cumsum(lengths)))
    buffer = pa.allocate_buffer(int(ends[-1]) * kind.bit_width // 8)
    # Byte views of one document at a time: no list of a million slices for the garbage collector to walk.
    source, target = (
        memoryview(each).cast("B").cast("i" if kind.bit_width == 32 else "h") for each in (column.values.buffers()[1], buffer)
    )
    starts = begins[:-1][order].tolist()
    for start, length, stop in zip(starts, lengths.tolist(), ends[1:].tolist()):
        target[stop - length : stop] = source[start : start + length]
    tokens = pa.Array.from_buffers(kind, int(ends[-1]), [None, buffer])
    packed = pa.LargeListArray.from_arrays(pa.array(ends[offsets]), tokens)
    documents = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(lengths.astype(np.int32)))
    return pa.table({"input_ids": packed, "seq_lengths": documents})


def pack_trl_kernel(table: pa.Table, capacity: int) -> list[pa.Table]:
    """TRL's bfd without `datasets`: batch after batch, as `pack_dataset` cuts them."""
    batches = (table.slice(start, TRL_BATCH) for start in range(0, table.num_rows, TRL_BATCH))
    return [trl.data_utils._pack_bfd(batch, capacity) for batch in batches]


def race(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All variants on one distribution of lengths: CPU seconds a million tokens, efficiency, documents a second."""
    capacity, open_packs, max_delay = options.capacity, options.open_packs, options.max_delay
    lengths = lengths_of(name, options.samples, capacity)
    values = np.ones(lengths.sum(), dtype=f"int{8 * options.token_bytes}")
    column = pa.LargeListArray.from_arrays(pa.array(np.concatenate(([0], np.cumsum(lengths)))), pa.array(values))
    table = pa.table({"input_ids": column})
    # With the CPU profile freed memory is kept, so nobody's first run pays for page faults that the next one doesn't.
    np.ones(2 * values.nbytes, dtype=np.uint8).sum()
    dataset = datasets.Dataset(table)
    outputs: dict[str, Any] = {}

    def keep(variant: str, pack: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            outputs.pop(variant, None)
            outputs[variant] = None
            packed = pack()
            outputs[variant] = sum(part.num_rows for part in packed) if isinstance(packed, list) else packed.num_rows

        return run

    map_kwargs = {"keep_in_memory": True, "load_from_cache_file": False}
    variants = {
        "ours": lambda: pack_ours(table, capacity, open_packs, max_delay),
        "trl_bfd": lambda: pack_dataset(dataset, capacity, "bfd", map_kwargs=dict(map_kwargs)),
        "trl_bfd_kernel": lambda: pack_trl_kernel(table, capacity),
        "trl_wrapped": lambda: pack_dataset(dataset, capacity, "wrapped", map_kwargs=dict(map_kwargs)),
        "torchtune_greedy": lambda: pack_greedy(table, capacity),
    }
    seconds = interleaved_cpu_seconds({key: keep(key, pack) for key, pack in variants.items()}, rounds=options.rounds)
    num_tokens = int(lengths.sum())
    result: dict[str, Any] = {
        key: {
            "cpu_seconds": value,
            "cpu_ns_per_token": value * 1e9 / num_tokens,
            "samples_per_cpu_second": options.samples / value,
            "efficiency": num_tokens / (capacity * outputs[key]),
        }
        for key, value in medians(seconds).items()
    }
    gc.collect()
    return result | {"tokens": num_tokens, "decisions_per_cpu_second": _decision_rate(lengths, options)}


def _decision_rate(lengths: np.ndarray, options: argparse.Namespace) -> float:
    """Placements a CPU second of the packer alone, without moving tokens."""
    packer: BestFitPacker[int] = BestFitPacker(options.capacity, options.open_packs, options.max_delay)
    items = lengths.tolist()
    seconds = interleaved_cpu_seconds({"decisions": lambda: packer.extend(items, range(len(items)))}, rounds=1)
    return len(items) / seconds["decisions"][0]


def main(arguments: Sequence[str]) -> None:
    """Race on each distribution and print the report; headline figures are the worst of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks packing")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--open-packs", type=int, default=128)
    parser.add_argument("--max-delay", type=int, default=1024)
    parser.add_argument("--token-bytes", type=int, choices=(2, 4), default=4)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    floor = measure_floor()
    cases: dict[str, Any] = {}
    for name in options.cases:
        say(f"{name}: {options.samples} documents, rows of {options.capacity}")
        cases[name] = race(name, options)
    report = Report("packing", details={"options": vars(options), "cases": cases})
    for key in ("ours", *PEERS):
        figures = {
            "cpu_ns_per_token": max(case[key]["cpu_ns_per_token"] for case in cases.values()),
            "efficiency": min(case[key]["efficiency"] for case in cases.values()),
        }
        if key == "ours":
            report.ours = figures | {
                "open_packs": float(options.open_packs),
                "max_delay": float(options.max_delay),
                "decisions_per_cpu_second": min(case["decisions_per_cpu_second"] for case in cases.values()),
            }
        else:
            report.peers[key] = figures
            # The smallest advantage over the distributions, not the ratio of two worst cases.
            report.ratios[f"cpu_ns_per_token_vs_{key}"] = min(
                case[key]["cpu_seconds"] / case["ours"]["cpu_seconds"] for case in cases.values()
            )
            report.ratios[f"efficiency_vs_{key}"] = min(
                case["ours"]["efficiency"] / case[key]["efficiency"] for case in cases.values()
            )
    report.targets = {"cpu_ns_per_token_vs_trl_bfd": TARGET_SPEED, "efficiency": TARGET_EFFICIENCY}
    report.print(floor)
