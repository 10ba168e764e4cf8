"""From the artifacts of a training of output heads to its report: `report.html` for people, `summary.json` for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.config.heads import HeadConfig
from lib.core.artifact import Staged, read_manifest
from lib.core.errors import DataError
from lib.core.manifest import Json
from lib.evals.charts import line_chart
from lib.evals.heads import HeadScore, HeadsReport, read_heads_report
from lib.evals.loss import not_finite_warnings
from lib.evals.page_parts import MASK_LEGEND, document, facts_table, section, table, text
from lib.evals.summary import speed_facts, time_facts, training_tile


def write_heads_page(staged: Staged, *, checkpoint: Path, before: Path, after: Path) -> Json:
    """Write both files; returns what is in summary.json.

    checkpoint, before, after: verified artifact folders; `before` scores the model that training started from.

    Raises:
        DataError: the scores are not of the same heads and rows.
    """
    train = json.loads((checkpoint / "train_report.json").read_text(encoding="utf-8"))
    manifest, first, last = read_manifest(checkpoint), read_heads_report(before), read_heads_report(after)
    told, other = _rows_of(first, last), _rows_of(last, first)
    if told != other:
        raise DataError(f"the scores are of other rows or heads ({told} and {other}); score the same ones")
    lineage = {"checkpoint": manifest.digest, "before": read_manifest(before).digest, "after": read_manifest(after).digest}
    lineage |= {f"checkpoint from {name}": digest for name, digest in manifest.lineage.items()}
    summary = {
        "loss_before": first.loss,
        "loss_after": last.loss,
        "heads": {score.name: _compared(score, trained) for score, trained in zip(first.heads, last.heads)},
        "num_eval": last.num_rows,
        "not_finite_before": first.num_not_finite,
        "not_finite_after": last.num_not_finite,
        "steps": len(train["curves"]["loss"]),
        "num_tokens": manifest.counts["num_tokens"],
        "packing_efficiency": train["packing"]["efficiency"],
        **speed_facts(manifest),
        "checkpoint_digest": manifest.digest,
        "mlflow_run_id": manifest.info.get("mlflow_run_id"),
    }
    (staged.path / "report.html").write_text(_page(summary, train, first, last, lineage | manifest.versions), encoding="utf-8")
    (staged.path / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True), encoding="utf-8")
    return summary


def evaluation_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """What belongs beside the training metrics in a tracker."""
    found = {f"eval.{name}": summary[name] for name in ("loss_before", "loss_after", "not_finite_before", "not_finite_after")}
    for name, score in summary["heads"].items():
        found |= {f"eval.{name}.{key}": value for key, value in score.items() if value is not None}
    return found


def _rows_of(report: HeadsReport, other: HeadsReport) -> dict[str, float]:
    """What must be alike: rows, heads, and where all rows count their targets."""
    all_count = not (report.num_not_finite or other.num_not_finite)
    targets = {score.name: score.num_targets if all_count else 0.0 for score in report.heads}
    return {"rows": report.num_rows + report.num_not_finite, **targets}


def _compared(before: HeadScore, after: HeadScore) -> dict[str, float | None]:
    losses = {"loss_before": before.loss, "loss_after": after.loss, "num_targets": after.num_targets}
    return {**losses, "accuracy_before": before.accuracy, "accuracy_after": after.accuracy}


def _page(summary: Json, train: Json, before: HeadsReport, after: HeadsReport, lineage: Mapping[str, str]) -> str:
    curves = train["curves"]
    steps, names = curves["step"], [score.name for score in after.heads]
    charts = line_chart("Loss", steps, curves["loss"], smooth=True) + "".join(
        line_chart(f"Loss of {name}", steps, curves[f"loss/{name}"], smooth=True) for name in names
    )
    head = ["Head", "Trained by", "Targets", "Loss", "Right"]
    job = text(json.dumps(train["job"], indent=1))
    sections = [
        section("Training", charts + line_chart("Learning rate", steps, curves["learning_rate"]), wide=True),
        section("Held-out rows", table(head, _scores(train["job"], before, after))),
        section("What is trained", MASK_LEGEND + "".join(map(_preview, train["mask_preview_html"], train["labels"]))),
        section("Time and memory", facts_table(time_facts(summary))),
        section("Lineage", facts_table(lineage) + f"<details><summary>Configuration</summary><pre>{job}</pre></details>"),
    ]
    tiles = [
        ("Held-out loss", f"{summary['loss_before']:.3f} → {summary['loss_after']:.3f}", f"{summary['num_eval']} rows"),
        ("Heads", str(len(names)), ", ".join(names)),
        ("Packing", f"{summary['packing_efficiency']:.2%}", "of slots filled"),
        ("Tokens", f"{summary['num_tokens']:,}", f"{summary['steps']} steps"),
        training_tile(summary),
    ]
    return document("Output heads", tiles, sections, not_finite_warnings(before.num_not_finite, after.num_not_finite))


def _scores(job: Json, before: HeadsReport, after: HeadsReport) -> list[list[str]]:
    """A line for each head, in order; its loss by name and by its weight in the sum."""
    heads = [HeadConfig.parse(values, where="job") for values in job["config"]["heads"]]
    return [
        [
            first.name,
            f"{head.trained_by.replace('_', ' ')} by {'token' if head.by_token else 'document'}, weight {head.weight:g}",
            f"{last.num_targets:,.0f}",
            f"{first.loss:.4f} → {last.loss:.4f}",
            "–" if last.accuracy is None else f"{first.accuracy:.1%} → {last.accuracy:.1%}",
        ]
        for head, first, last in zip(heads, before.heads, after.heads, strict=True)
    ]


def _preview(mask_html: str, labels: Mapping[str, Any]) -> str:
    """A row and what its heads should put out; of labels by token, how many there are."""
    by_token = {name: value for name, value in labels.items() if isinstance(value, list)}
    counts = {name: f"{sum(v is not None for v in value)} of {len(value)} tokens" for name, value in by_token.items()}
    told = [f"{name}: {value}" for name, value in {**labels, **counts}.items()]
    return f'<div class="preview">{mask_html}</div><p>{text(", ".join(told)) or "no labels"}</p>'
