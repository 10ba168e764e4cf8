"""Laws of the mixture: shares as set, caps kept to the row, every turn accounted for, the same after a restart."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.data import DataConfig
from lib.core.errors import ConfigError, DataError
from lib.data.mixture import OWN_DATA, Mixer, Mixture
from tests.lib.data.memory import source_of

SIZES = {"a": [50, 50], "b": [30], "c": [7]}


def _mixture(sources: list[dict[str, Any]], **settings: Any) -> Mixture:
    values = [{"location": f"/{source['name']}", **source} for source in sources]
    config = DataConfig.parse({"num_streams": 4, "shuffle_rows": 8, "mixture": values, **settings}, where="test")
    return Mixture.of({source["name"]: source_of(SIZES[source["name"]], prefix=source["name"]) for source in sources}, config)


def _take(mixer: Mixer, num_rows: int, step: int = 0) -> Counter[str]:
    return Counter(example.sample_id[0] for *_, example in mixer.take(num_rows, step))


def test_shares_are_the_weights() -> None:
    """5 : 3 : 2 of 20,000 rows, over two streams; four standard deviations of a binomial are 0.015."""
    mixture = _mixture([{"name": "a", "weight": 5.0}, {"name": "b", "weight": 3.0}, {"name": "c", "weight": 2.0}])
    shares = Counter[str]()
    for stream in (0, 1):
        shares += _take(Mixer(mixture, stream), 10_000)
    assert {name: round(count / 20_000, 1) for name, count in shares.items()} == {"a": 0.5, "b": 0.3, "c": 0.2}
    assert all(abs(shares[name] / 20_000 - share) < 0.015 for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)))


def test_temperature_flattens_the_weights() -> None:
    """9 : 1 at temperature 2 is 3 : 1."""
    mixture = _mixture([{"name": "a", "weight": 9.0}, {"name": "b", "weight": 1.0}], temperature=2.0)
    assert mixture.weights(0) == pytest.approx((0.75, 0.25))


def test_schedule_goes_evenly_from_point_to_point() -> None:
    """b: 0 until step 10, then up to 3 at step 40, and stays; a: 1. Nothing of b is read before its time."""
    points = [{"step": 10, "weight": 0.0}, {"step": 40, "weight": 3.0}]
    mixture = _mixture([{"name": "a"}, {"name": "b", "schedule": points}])
    shares = [mixture.weights(step)[1] for step in (0, 10, 20, 40, 1000)]
    assert shares == pytest.approx([0.0, 0.0, 0.5, 0.75, 0.75])
    assert _take(Mixer(mixture, 0), 500, step=5) == {"a": 500}
    assert 0.7 < _take(Mixer(mixture, 0), 2000, step=50)["b"] / 2000 < 0.8


@pytest.mark.parametrize(
    ("cap", "expected"), [({"max_rows": 10}, 10), ({"max_epochs": 2}, 2 * 7), ({"max_epochs": 1, "max_rows": 30}, 7)]
)
def test_caps_hold_over_all_streams_and_turns_are_passed_on(cap: dict[str, int], expected: int) -> None:
    """Four streams: c gives exactly as many rows as its cap allows, each of its rows equally often; the turns that it
    misses are counted, and a and b get them in their proportion of 3 : 1."""
    mixture = _mixture([{"name": "a", "weight": 3.0}, {"name": "b", "weight": 1.0}, {"name": "c", "weight": 4.0, **cap}])
    mixers = [Mixer(mixture, stream) for stream in range(4)]
    rows = [example.sample_id for mixer in mixers for *_, example in mixer.take(2000, 0)]
    counts = Counter(name[0] for name in rows)
    assert counts["c"] == expected == sum(mixer.num_rows[2] for mixer in mixers)
    uses = Counter(name for name in rows if name[0] == "c")
    assert max(uses.values()) <= -(-expected // 7) + ("max_rows" in cap and "max_epochs" not in cap)
    turns = counts["c"] + sum(mixer.num_passed_on[2] for mixer in mixers)
    assert abs(turns / 8000 - 0.5) < 0.03
    assert abs(counts["a"] / (counts["a"] + counts["b"]) - 0.75) < 0.03
    assert [sum(mixer.num_passed_on[n] for mixer in mixers) for n in (0, 1)] == [0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400), st.integers(1, 30), st.integers(0, 3))
def test_restart_changes_no_draw(stop: int, at_once: int, stream: int) -> None:
    """[F3] Before and after the cap is reached. The state is JSON."""
    sources = [{"name": "a"}, {"name": "b", "weight": 2.0}, {"name": "c", "weight": 3.0, "max_epochs": 3}]
    mixture = _mixture(sources)
    whole, first, second = (Mixer(mixture, stream) for _ in range(3))
    expected = [place for *place, _ in whole.take(stop + 60, 0)]
    found: list[list[int]] = []
    while len(found) < stop:
        found += [place for *place, _ in first.take(min(at_once, stop - len(found)), 0)]
    second.load_state(json.loads(json.dumps(first.state())))
    assert found + [place for *place, _ in second.take(60, 0)] == expected
    assert json.dumps(second.state()) == json.dumps(whole.state())


def test_nothing_left_to_give_is_an_error() -> None:
    """a stops at step 10 by its schedule, and c is capped: at step 20 nobody's turn can be taken."""
    points = [{"step": 0, "weight": 1.0}, {"step": 10, "weight": 0.0}]
    mixture = _mixture([{"name": "a", "schedule": points}, {"name": "c", "weight": 1.0, "max_epochs": 1}])
    with pytest.raises(DataError, match=r"at step 20 every source of data.mixture that has a weight has reached its cap"):
        Mixer(mixture, 0).take(100, 20)


def test_sources_must_be_those_of_the_mixture() -> None:
    source = source_of([5])
    with pytest.raises(ConfigError, match=r"names the sources \['data'\], given are \['other'\]"):
        Mixture.of({"other": source}, DataConfig())
    assert Mixture.of({OWN_DATA: source}, DataConfig()).weights(0) == (1.0,)
