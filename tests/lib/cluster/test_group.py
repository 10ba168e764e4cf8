"""Laws of a worker group that hold on every backend."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.cluster.group import Dispatch, Worker, WorkerGroup, check_plain, declaration_of, merge_results, split_args
from tests.lib.cluster.conftest import ENV, Start
from tests.lib.cluster.workers import Probe

SOON = 60.0


@pytest.fixture(scope="module")
def pair(start: Start) -> Iterator[WorkerGroup]:
    """Two ranks in a process group, shared by the tests that leave them whole."""
    with start() as group:
        yield group


def test_each_rank_has_its_own_place_and_process(pair: WorkerGroup) -> None:
    found = pair.call("identity", deadline_seconds=SOON)
    assert [one["rank"] for one in found] == [0, 1]
    assert [one["local_rank"] for one in found] == [0, 1]
    assert all(one["num_ranks"] == 2 and one["device"] == "cpu" and one["node_rank"] == 0 for one in found)
    assert len({one["pid"] for one in found} | {os.getpid()}) == 3
    assert found[0]["master_port"] == found[1]["master_port"] > 0


def test_environment_is_set_in_every_worker(pair: WorkerGroup) -> None:
    """[J5] What the driver asks for is what the worker sees."""
    assert pair.call("env", list(ENV), deadline_seconds=SOON) == [list(ENV.values())] * 2


def test_ranks_compute_together(pair: WorkerGroup) -> None:
    """1 + 2 = 3 on both ranks."""
    assert pair.call("all_reduce", deadline_seconds=SOON) == [3.0, 3.0]


def test_arguments_are_split_and_results_merged_as_declared(pair: WorkerGroup) -> None:
    assert pair.call("echo", ["a", {"b": 1}], deadline_seconds=SOON) == ["a", {"b": 1}]
    assert pair.call("count", deadline_seconds=SOON) == {"ranks": 2, "rank": 1, "only 0": 1, "only 1": 1}
    assert pair.call("whoami", deadline_seconds=SOON) == 0


def test_paths_and_json_values_come_back_as_they_went(pair: WorkerGroup) -> None:
    assert pair.call("give_back", Path("/data"), deadline_seconds=SOON) == {"path": Path("/data"), "list": [1, 2.5, None, True]}


def test_events_arrive_whole_and_in_order(pair: WorkerGroup) -> None:
    """Only rank 0's, unless the method says otherwise; the last ones come before the call returns."""
    events: list[dict[str, int]] = []
    assert pair.call("emit_steps", 60, deadline_seconds=SOON, on_events=events.extend) == "done"
    assert events == [{"step": step, "rank": 0} for step in range(60)]
    events.clear()
    pair.call("emit_everywhere", deadline_seconds=SOON, on_events=events.extend)
    assert sorted(event["hello"] for event in events) == [0, 1]


def test_data_processes_of_a_rank_end(pair: WorkerGroup) -> None:
    """[A12] Two processes a rank, started five times, in ranks that run threads of Ray and torch: the same step."""
    found = pair.call("stream_in_processes", 5, deadline_seconds=SOON)
    assert found == found[:1] * 5 and found[0] > 0


def test_a_method_must_be_declared(pair: WorkerGroup) -> None:
    with pytest.raises(TypeError, match=r"Probe\.undeclared is not a method declared"):
        declaration_of(Probe, "undeclared")
    with pytest.raises(TypeError, match="not a method"):
        declaration_of(Probe, "missing")


def test_split_by_rank_wants_an_item_for_each_rank() -> None:
    declared = Dispatch("by_rank", "all", "rank0")
    assert split_args(declared, [[1, 2], ["a", "b"]], 2) == [[1, "a"], [2, "b"]]
    for wrong in ([1], 5, [1, 2, 3]):
        with pytest.raises(TypeError, match="list of 2 items"):
            split_args(declared, [wrong], 2)


def test_sum_adds_numbers_and_dicts() -> None:
    declared = Dispatch("same", "sum", "rank0")
    assert merge_results(declared, [1, 2, 3]) == 6
    assert merge_results(declared, [{"a": 1, "b": 0.5}, {"a": 2, "b": 0.25}]) == {"a": 3, "b": 0.75}


def test_only_plain_values_cross() -> None:
    plain = {"a": [1, 2.0, "x", None, True, Path("/p")], "b": {"c": (1, 2)}}
    check_plain(plain, "it")
    json.dumps({key: value for key, value in plain.items() if key == "b"})
    for hostile in (object(), {1: 2}, b"bytes", {"f": Worker}, {1, 2}):
        with pytest.raises(TypeError, match="it: "):
            check_plain(hostile, "it")
