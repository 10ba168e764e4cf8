"""From the artifacts of the quality gates to a page about the data: `report.html` for people, `summary.json` for programs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lib.config.quality import PreviewConfig
from lib.core.artifact import Staged, read_manifest
from lib.core.errors import DataError, UserError
from lib.core.examples import Conversation, Example
from lib.core.manifest import Json, Manifest
from lib.data.feed import ChatFeed
from lib.data.inspection import InspectedRow, encoded_parts, heading, preview_html
from lib.data.mixture import OWN_DATA
from lib.data.quality.datasets import open_rows
from lib.data.quality.report import REPORT_NAME
from lib.data.stats import PackingReport, packing_report
from lib.data.stream import Share
from lib.evals.data_page import DataPage, FormatPreview, Histogram, Stage, render_data_page
from lib.tokens.chat import ChatEncoder
from lib.tokens.rules import ChatRules
from lib.tokens.tokenizer import Tokenizer

_LOOKED_AT = 500
"""Rows among which those to show are chosen."""
_FORMATS: dict[Literal["template", "harmony", "table"], str] = {
    "template": "The tokenizer's chat template",
    "harmony": "Harmony",
    "table": "The configured table",
}
_STAGES = ("Checked", "Without duplicates", "Without benchmark rows")


@dataclass(frozen=True)
class DataFolders:
    """Verified artifacts of one run."""

    stages: Sequence[Path]
    """Data sets: ingested, cleaned, decontaminated."""
    train: Path
    evaluation: Path
    quality: Path
    """The report on what was ingested."""
    tokenizer: Path


def write_data_report(staged: Staged, folders: DataFolders, config: PreviewConfig) -> Json:
    """Write both files; returns what is in summary.json. What can't be encoded or packed is told on the page."""
    quality = json.loads((folders.quality / REPORT_NAME).read_text(encoding="utf-8"))
    stages = _stages(folders)
    kind = read_manifest(folders.train).meta["format"]
    previews, packing, warnings = _tokens(folders, config, kind)
    summary = {
        "kind": kind,
        "rows": {stage.name: stage.num_rows for stage in stages},
        "findings": {name: found["rows"] for name, found in quality["findings"].items()},
        "packing": None if packing is None else packing.to_json(),
        "formats": [preview.name for preview in previews],
        "warnings": warnings,
    }
    page = DataPage(
        tiles=_tiles(stages, quality, packing, config),
        stages=stages,
        histograms=[
            Histogram(f"{name.capitalize()} of a row", name, quality["text"][name]["histogram"])
            for name in ("characters", "words")
        ],
        scripts=quality["text"]["script_shares"],
        findings=[(name, found["hits"], found["rows"], found["first_ids"]) for name, found in quality["findings"].items()],
        efficiency=None if packing is None else packing.efficiency,
        packing_facts={} if packing is None else _packing_facts(packing, config),
        lengths=None if packing is None else Histogram("Lengths of documents", "tokens", packing.length_histogram),
        previews=previews,
        lineage=_lineage(folders),
        config=json.dumps(config.model_dump(mode="json"), indent=1),
        warnings=warnings,
    )
    (staged.path / "report.html").write_text(render_data_page(page), encoding="utf-8")
    (staged.path / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True), encoding="utf-8")
    return summary


def _stages(folders: DataFolders) -> list[Stage]:
    manifests = [read_manifest(folder) for folder in folders.stages]
    counts = manifests[0].counts
    found = [Stage("Read", counts["rows_seen"])]
    for name, manifest in zip(_STAGES, manifests):
        found.append(Stage(name, manifest.counts["rows_kept"], _left_out(manifest)))
    for name, folder in (("For training", folders.train), ("Held out", folders.evaluation)):
        found.append(Stage(name, read_manifest(folder).counts["rows_kept"]))
    return found


def _left_out(manifest: Manifest) -> list[tuple[str, int, Sequence[str]]]:
    reasons = manifest.info.get("left_out")
    if reasons is None:
        bad = manifest.counts["rows_dropped"]
        return [("can't be used", bad, ())] if bad else []
    return [(reason.replace("_", " "), left["rows"], left["first_ids"]) for reason, left in reasons.items() if left["rows"]]


def _tokens(
    folders: DataFolders, config: PreviewConfig, kind: str
) -> tuple[list[FormatPreview], PackingReport | None, list[str]]:
    """Previews, packing where rows are conversations, and what a run would stumble over."""
    if kind == "events":
        return [], None, []  # no tokenizer reads them
    tokenizer = Tokenizer.load(folders.tokenizer)
    rows = _chosen(folders.train, config.examples)
    warnings: list[str] = []
    try:
        used = ChatEncoder.of(tokenizer, config.data)
    except UserError as error:
        return [], None, [str(error)]
    shown = [(_FORMATS[config.data.chat_format], used)]
    if kind == "conversation":
        shown += _other_formats(tokenizer, config)
    previews = []
    for name, encoder in shown:
        parts, problems = _shown(rows, encoder)
        previews.append(FormatPreview(name, encoder is used, parts))
        warnings += problems if encoder is used else []
    packing = None
    if kind == "conversation":
        try:
            packing = _packed(folders, used, config)
        except DataError as error:
            warnings.append(str(error))
    if packing is not None and packing.dropped and config.data.long_rows == "refuse":
        warnings.append(
            f"{packing.dropped:,} of the {packing.visited:,} rows looked at are longer than {config.sequence_length} tokens: "
            "training would refuse them; raise sequence_length or set long_rows"
        )
    return previews, packing, warnings


def _other_formats(tokenizer: Tokenizer, config: PreviewConfig) -> list[tuple[str, ChatEncoder]]:
    """Those that this tokenizer allows beside the one that is used."""
    found = []
    for name, title in _FORMATS.items():
        if name in (config.data.chat_format, "table"):
            continue
        rules = replace(ChatRules.of(config.data), chat_format=name, chat_table=None)
        try:
            found.append((title, ChatEncoder(tokenizer, rules)))
        except UserError:
            continue
    return found


def _chosen(folder: Path, num_rows: int) -> list[Example]:
    """Rows that are unlike each other in what they hold, then the first ones."""
    table = open_rows(folder)
    rows = [table[index] for index in range(min(len(table), _LOOKED_AT))]
    first_of = {_features(row): row for row in reversed(rows)}
    unlike = sorted(first_of.values(), key=rows.index)
    return [*unlike, *(row for row in rows if row not in unlike)][:num_rows]


def _features(row: Example) -> tuple[Any, ...]:
    if not isinstance(row, Conversation):
        return ()
    roles = [message.role for message in row.messages]
    thinks = any(message.thinking is not None for message in row.messages)
    return "system" in roles, "tool" in roles, bool(row.tools), thinks, roles.count("assistant") > 1


def _shown(rows: Sequence[Example], encoder: ChatEncoder) -> tuple[list[tuple[str, str]], list[str]]:
    """(heading, HTML) of each row, and what is wrong with those that can't be encoded."""
    parts, problems = [], []
    for row in rows:
        try:
            inspected = InspectedRow(OWN_DATA, row, encoded_parts([row], encoder)[0])
        except DataError as error:
            problems.append(str(error))
            continue
        parts.append((heading(inspected), preview_html(inspected, encoder)))
    return parts, problems


def _packed(folders: DataFolders, encoder: ChatEncoder, config: PreviewConfig) -> PackingReport:
    """The first packed rows as a run would make them, but that rows which are too long are counted and not refused."""
    data = config.data.model_copy(update={"mixture": (), "workers": 0, "temperature": 1.0})
    if data.long_rows == "refuse":
        data = data.model_copy(update={"long_rows": "drop"})
    feed = ChatFeed(data, str(folders.train), str(folders.tokenizer), config.sequence_length, data.num_streams)
    (stream,) = feed.streams(encoder, [Share()])
    for _ in range(math.ceil(config.packed_rows / data.num_streams)):
        stream.next_step()
    return packing_report(stream.state())


def _packing_facts(packing: PackingReport, config: PreviewConfig) -> dict[str, str]:
    return {
        "Packed rows looked at": f"{packing.rows:,} of {config.sequence_length:,} tokens each",
        "Documents in a packed row": f"{packing.documents_per_row:.1f}",
        "Tokens that are trained": f"{packing.targets / max(1, packing.tokens):.1%}",
        "Rows longer than a packed row": f"{packing.dropped + packing.truncated + packing.split:,} of {packing.visited:,}",
        "Tokens lost to length": f"{packing.lost_to_length:.2%}",
    }


def _tiles(
    stages: Sequence[Stage], quality: Json, packing: PackingReport | None, config: PreviewConfig
) -> list[tuple[str, str, str]]:
    rows = {stage.name: stage.num_rows for stage in stages}
    kept = rows["For training"] + rows["Held out"]
    found = sum(kind["rows"] for kind in quality["findings"].values())
    tiles = [
        ("For training", f"{rows['For training']:,}", "rows"),
        ("Held out", f"{rows['Held out']:,}", "rows"),
        ("Left out", f"{rows['Read'] - kept:,}", f"of {rows['Read']:,} rows"),
        ("Secrets, personal data", f"{found:,}", "findings by kind and row"),
    ]
    if packing is not None:
        tiles.append(("Packing", f"{packing.efficiency:.2%}", f"of slots filled at {config.sequence_length:,} tokens"))
    return tiles


def _lineage(folders: DataFolders) -> dict[str, str]:
    names = dict(zip(("ingested", "without duplicates", "without benchmark rows"), folders.stages))
    names |= {"training": folders.train, "held out": folders.evaluation, "tokenizer": folders.tokenizer}
    return {name: read_manifest(folder).digest for name, folder in names.items()}
