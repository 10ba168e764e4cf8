"""The page shows what it is given, whatever a model wrote, and needs nothing beside it."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from lib.evals.charts import bar_chart, interval_chart, line_chart
from lib.evals.deck import Page, Sample, Score, render

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="alert(1)">&amp;'
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


class _Tags(HTMLParser):
    """Names of all opened tags, and those left open at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _page(text: str, **changes: object) -> Page:
    values: dict[str, object] = {
        "title": text,
        "tiles": [(text, text, text)],
        "steps": [1, 2],
        "losses": [2.0, 1.0],
        "learning_rates": [0.0, 1e-5],
        "packing_efficiency": 0.5,
        "length_labels": [text],
        "length_counts": [3],
        "packing_facts": {text: text},
        "time_facts": {text: text},
        "mask_previews": ["<div>made and escaped by the chat encoder</div>"],
        "scores": [Score(text, 0.5, 0.4, 0.6, None)],
        "num_eval": 2,
        "paired": [(text, 1)],
        "p_value": 0.25,
        "samples": [Sample(text, text, text, text, before_correct=False, after_correct=True)],
        "lineage": {text: text},
        "config": text,
        "warnings": [text],
    }
    return Page(**{**values, **changes})  # type: ignore[arg-type]


def test_hostile_text_stays_text() -> None:
    """Nothing that a model, a user or a file name says becomes markup."""
    parsed = _Tags(render(_page(HOSTILE)))
    assert not {"script", "img", "link", "iframe"} & parsed.seen
    assert parsed.open == []


def test_the_page_needs_nothing_beside_it() -> None:
    text = render(_page("plain"))
    assert "src=" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_what_was_not_measured_is_left_out() -> None:
    text = render(
        _page("x", packing_efficiency=None, p_value=None, samples=[], length_counts=[], length_labels=[], mask_previews=[])
    )
    assert _Tags(text).open == []
    assert "McNemar" not in text


@given(st.lists(finite, min_size=1, max_size=30), st.booleans())
def test_any_finite_values_make_a_chart(values: list[float], smooth: bool) -> None:
    chart = line_chart("any", range(len(values)), values, smooth=smooth)
    assert "nan" not in chart
    assert "inf" not in chart.replace("infinite", "")
    assert _Tags(chart).open == []


def test_charts_of_nothing_say_so() -> None:
    assert "no points" in line_chart("x", [], [])
    assert "nothing counted" in bar_chart("x", ["a"], [0], unit="rows")
    assert "<circle" not in interval_chart([])
