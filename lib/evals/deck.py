"""The page that a person opens after a run: one HTML file with everything in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lib.evals.charts import bar_chart, interval_chart, line_chart
from lib.evals.page_parts import MASK_LEGEND, document, facts_table, gauge, section, text


@dataclass(frozen=True)
class Score:
    """A model's result on the evaluation set."""

    name: str
    accuracy: float
    low: float
    high: float
    """Confidence interval of the accuracy."""
    loss: float | None
    """Held-out loss for each trained token."""


@dataclass(frozen=True)
class Sample:
    """One row of the evaluation set with the answers of both models."""

    prompt: str
    expected: str
    before: str
    after: str
    before_correct: bool
    after_correct: bool


@dataclass(frozen=True)
class Page:
    """All that the page shows, in reading order."""

    title: str
    tiles: Sequence[tuple[str, str, str]]
    """(name, value, remark)"""
    steps: Sequence[int]
    losses: Sequence[float]
    """[steps] mean loss of each step's trained tokens."""
    learning_rates: Sequence[float]
    packing_efficiency: float | None
    """Tokens of documents over slots of packed rows."""
    length_labels: Sequence[str]
    length_counts: Sequence[int]
    packing_facts: Mapping[str, str]
    time_facts: Mapping[str, str]
    """Where the time of a step went, and the memory."""
    mask_previews: Sequence[str]
    """HTML made by the chat encoder, which has escaped it."""
    scores: Sequence[Score]
    num_eval: int
    paired: Sequence[tuple[str, int]]
    """Counts of the 2x2 table of correct before and after."""
    p_value: float | None
    samples: Sequence[Sample]
    lineage: Mapping[str, str]
    config: str
    """JSON text."""
    warnings: Sequence[str] = field(default_factory=tuple)


def render(page: Page) -> str:
    """The HTML page."""
    sections = [
        section(
            "Training",
            line_chart("Loss", page.steps, page.losses, smooth=True)
            + line_chart("Learning rate", page.steps, page.learning_rates),
            wide=True,
        ),
        section("Evaluation", _evaluation(page)),
        section("Packing", _packing(page)),
        section("Time and memory", facts_table(page.time_facts)),
        section("What is trained", _masks(page)),
        section("Sample answers", _samples(page.samples)),
        section(
            "Lineage",
            facts_table(page.lineage) + f"<details><summary>Configuration</summary><pre>{text(page.config)}</pre></details>",
        ),
    ]
    return document(page.title, page.tiles, sections, page.warnings)


def _evaluation(page: Page) -> str:
    rows = "".join(
        f"<tr><td>{text(s.name)}</td><td>{s.accuracy:.1%}</td><td>{s.low:.1%} – {s.high:.1%}</td>"
        f"<td>{'–' if s.loss is None else f'{s.loss:.4f}'}</td></tr>"
        for s in page.scores
    )
    head = "<tr><th>Model</th><th>Accuracy</th><th>Interval</th><th>Held-out loss</th></tr>"
    paired = "".join(f"<tr><td>{text(name)}</td><td>{count}</td></tr>" for name, count in page.paired)
    p_value = "" if page.p_value is None else f"<p>Exact McNemar test of the paired answers: p = {page.p_value:.2g}</p>"
    chart = interval_chart([(s.name, s.low, s.accuracy, s.high) for s in page.scores])
    return (
        f"<p>{page.num_eval} rows, greedy decoding.</p>{chart}<table>{head}{rows}</table>"
        f"<table><tr><th>Before → after</th><th>Rows</th></tr>{paired}</table>{p_value}"
    )


def _packing(page: Page) -> str:
    bar = "" if page.packing_efficiency is None else gauge("Slots filled with tokens", page.packing_efficiency)
    histogram = bar_chart("Lengths of documents", page.length_labels, page.length_counts, unit="tokens")
    return bar + (histogram if page.length_counts else "") + facts_table(page.packing_facts)


def _masks(page: Page) -> str:
    return MASK_LEGEND + "".join(f'<div class="preview">{preview}</div>' for preview in page.mask_previews)


def _samples(samples: Sequence[Sample]) -> str:
    def answer(said: str, correct: bool) -> str:
        badge = '<i class="yes">✓</i>' if correct else '<i class="no">✗</i>'
        return f"<td>{badge}<pre>{text(said)}</pre></td>"

    rows = "".join(
        f"<tr><td><pre>{text(s.prompt)}</pre></td><td><pre>{text(s.expected)}</pre></td>"
        f"{answer(s.before, s.before_correct)}{answer(s.after, s.after_correct)}</tr>"
        for s in samples
    )
    return f'<table class="samples"><tr><th>Prompt</th><th>Expected</th><th>Before</th><th>After</th></tr>{rows}</table>'
