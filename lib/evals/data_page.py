"""The page about a data set: which rows are left and why, what they hold, how they pack, and what of them is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lib.evals.charts import bar_chart
from lib.evals.page_parts import MASK_LEGEND, document, facts_table, gauge, section, table, text


@dataclass(frozen=True)
class Stage:
    """A step that rows go through."""

    name: str
    num_rows: int
    """After it."""
    left_out: Sequence[tuple[str, int, Sequence[str]]] = ()
    """(reason, rows, first ids)"""


@dataclass(frozen=True)
class Histogram:
    """Rows by a measure."""

    title: str
    unit: str
    bins: Sequence[tuple[int, int]]
    """(greatest value, rows)"""


@dataclass(frozen=True)
class FormatPreview:
    """Rows as one chat format writes them."""

    name: str
    is_used: bool
    rows: Sequence[tuple[str, str]]
    """(heading, HTML made by the chat encoder, which has escaped it)"""


@dataclass(frozen=True)
class DataPage:
    """All that the page shows, in reading order."""

    tiles: Sequence[tuple[str, str, str]]
    """(name, value, remark)"""
    stages: Sequence[Stage]
    histograms: Sequence[Histogram]
    scripts: Mapping[str, float]
    """Name -> share of the letters."""
    findings: Sequence[tuple[str, int, int, Sequence[str]]]
    """(kind, hits, rows, first ids)"""
    efficiency: float | None
    """Tokens of documents over slots of packed rows; None where nothing was packed."""
    packing_facts: Mapping[str, str]
    lengths: Histogram | None
    previews: Sequence[FormatPreview]
    lineage: Mapping[str, str]
    config: str
    """JSON text."""
    warnings: Sequence[str] = field(default_factory=tuple)


def render_data_page(page: DataPage) -> str:
    """The HTML page."""
    configuration = f"<details><summary>Configuration</summary><pre>{text(page.config)}</pre></details>"
    sections = [
        section("Rows", _stages(page.stages)),
        section("Text", "".join(map(_chart, page.histograms)), wide=True),
        section("Scripts", table(("Script", "Letters"), [(name, f"{share:.1%}") for name, share in page.scripts.items()])),
        section("Secrets and personal data", _findings(page)),
        *([section("Packing", _packing(page))] if page.efficiency is not None else []),
        *([section("What is trained", MASK_LEGEND + "".join(map(_preview, page.previews)))] if page.previews else []),
        section("Lineage", facts_table(page.lineage) + configuration),
    ]
    return document("Data set", page.tiles, sections, page.warnings)


def _stages(stages: Sequence[Stage]) -> str:
    rows = [
        (stage.name, f"{stage.num_rows:,}", "; ".join(_reason(*left) for left in stage.left_out) or "–") for stage in stages
    ]
    return table(("Stage", "Rows", "Left out"), rows)


def _reason(reason: str, count: int, ids: Sequence[str]) -> str:
    return f"{reason}: {count:,}" + (f" ({_some(ids, count)})" if ids else "")


def _findings(page: DataPage) -> str:
    rows = [(kind, f"{hits:,}", f"{count:,}", _some(ids, count)) for kind, hits, count, ids in page.findings]
    note = "<p>Only what has a form of its own is found, and nothing is left out for it. What was found is not kept.</p>"
    return note + table(("Kind", "Hits", "Rows", "In rows"), rows)


def _packing(page: DataPage) -> str:
    assert page.efficiency is not None
    chart = "" if page.lengths is None else _chart(page.lengths)
    return gauge("Slots filled with tokens", page.efficiency) + chart + facts_table(page.packing_facts)


def _preview(preview: FormatPreview) -> str:
    used = "the one that is configured" if preview.is_used else "available too"
    rows = "".join(f'<h4>{text(heading)}</h4><div class="preview">{shown}</div>' for heading, shown in preview.rows)
    return f"<h3>{text(preview.name)} <small>{used}</small></h3>{rows}"


def _chart(histogram: Histogram) -> str:
    labels = [f"≤ {end:,}" for end, _ in histogram.bins]
    return bar_chart(histogram.title, labels, [count for _, count in histogram.bins], unit=histogram.unit)


def _some(ids: Sequence[str], count: int) -> str:
    """The first ids of `count` rows."""
    return ", ".join(ids[:3]) + (", …" if count > min(3, len(ids)) else "")
