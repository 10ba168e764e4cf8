"""From the artifacts of a run to its report: `report.html` for people, `summary.json` for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.core.artifact import Staged, read_manifest
from lib.core.manifest import Json, Manifest
from lib.evals.deck import Page, Sample, Score, render
from lib.evals.loss import not_finite_warnings
from lib.evals.report import EvalReport, Paired, compare, read_eval_report

MAX_SHOWN_CHARS = 2000
GIB = 1 << 30
_PARTS = {
    "data": "Waiting for data",
    "wait": "Waiting for other ranks",
    "forward": "Forward",
    "backward": "Backward",
    "optimizer": "Clipping and optimizer",
    "collective": "Transfers between ranks",
    "save": "Saving",
    "other": "Other",
}
"""Part of a step -> what it is called."""


def write_report(
    staged: Staged, *, checkpoint: Path, train_data: Path, eval_data: Path, before: Path, after: Path, num_samples: int
) -> Json:
    """Write both files of a fine-tuning run's report; returns what is in summary.json.

    checkpoint, train_data, eval_data, before, after: verified artifact folders; `before` evaluates the model that training
    started from. num_samples: sample answers shown.
    """
    train = json.loads((checkpoint / "train_report.json").read_text(encoding="utf-8"))
    manifests = {name: read_manifest(folder) for name, folder in (("checkpoint", checkpoint), ("train_data", train_data))}
    manifests |= {"eval_data": read_manifest(eval_data), "before": read_manifest(before), "after": read_manifest(after)}
    reports = read_eval_report(before), read_eval_report(after)
    paired = compare(*reports)
    summary = _summary(train, manifests["checkpoint"], *reports, paired)
    page = _page(summary, train, manifests, *reports, paired, num_samples)
    (staged.path / "report.html").write_text(render(page), encoding="utf-8")
    (staged.path / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True), encoding="utf-8")
    return summary


def evaluation_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """What belongs beside the training metrics in a tracker."""
    pairs = [f"{name}_{when}" for name in ("accuracy", "held_out_loss", "not_finite") for when in ("before", "after")]
    return {f"eval.{name}": float(summary[name]) for name in (*pairs, "p_value", "num_eval") if summary[name] is not None}


def _summary(train: Json, checkpoint: Manifest, before: EvalReport, after: EvalReport, paired: Paired) -> Json:
    losses = train["curves"]["loss"]
    return {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "num_eval": after.num_eval,
        "p_value": paired.p_value,
        "held_out_loss_before": before.loss,
        "held_out_loss_after": after.loss,
        "not_finite_before": before.num_not_finite,
        "not_finite_after": after.num_not_finite,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "steps": len(losses),
        "num_tokens": checkpoint.counts["num_tokens"],
        "num_targets": checkpoint.counts["num_targets"],
        "packing_efficiency": train["packing"]["efficiency"],
        **speed_facts(checkpoint),
        "checkpoint_digest": checkpoint.digest,
        "weights_digest": checkpoint.meta["weights_digest"],
        "mlflow_run_id": checkpoint.info.get("mlflow_run_id"),
    }


def _page(
    summary: Json,
    train: Json,
    manifests: Mapping[str, Manifest],
    before: EvalReport,
    after: EvalReport,
    paired: Paired,
    num_samples: int,
) -> Page:
    packing, curves, checkpoint = train["packing"], train["curves"], manifests["checkpoint"]
    data = manifests["train_data"].counts
    lineage = {name: manifest.digest for name, manifest in manifests.items()}
    lineage |= {f"checkpoint from {name}": digest for name, digest in checkpoint.lineage.items()}
    return Page(
        title="Supervised fine-tuning",
        tiles=_tiles(summary),
        steps=curves["step"],
        losses=curves["loss"],
        learning_rates=curves["learning_rate"],
        packing_efficiency=packing["efficiency"],
        length_labels=[f"≤ {end}" for end, _ in packing["length_histogram"]],
        length_counts=[count for _, count in packing["length_histogram"]],
        packing_facts={
            **_rows(data),
            "Documents used": f"{packing['documents']:,} in {packing['rows']:,} packed rows",
            "Documents in a packed row": f"{packing['documents_per_row']:.1f}",
            "Documents cut": f"{packing['truncated']:,}",
            "Documents dropped": f"{packing['dropped']:,}",
        },
        time_facts=time_facts(summary),
        mask_previews=train["mask_preview_html"],
        scores=[_score("before", before), _score("after", after)],
        num_eval=after.num_eval,
        paired=[
            ("wrong → right", paired.gained),
            ("right → wrong", paired.lost),
            ("right → right", paired.both_right),
            ("wrong → wrong", paired.both_wrong),
        ],
        p_value=paired.p_value,
        samples=_samples(before, after, num_samples),
        lineage=lineage | checkpoint.versions,
        config=json.dumps(train["job"], indent=1),
        warnings=not_finite_warnings(before.num_not_finite, after.num_not_finite),
    )


def _rows(counts: Mapping[str, int]) -> dict[str, str]:
    """Of the data set trained on: one that is read in place has nothing counted but files."""
    if "rows_seen" not in counts:
        return {"Rows read in place": f"{counts['files']:,} files, {counts['size_bytes'] / (1 << 30):,.2f} GiB"}
    return {"Rows ingested, of rows seen": f"{counts['rows_kept']:,} of {counts['rows_seen']:,}"}


def time_facts(summary: Json) -> dict[str, str]:
    """Parts by their share of the time of all steps, the ranks' memory, and the rank that others waited for."""
    total = max(sum(summary["part_seconds"].values()), 1e-9)
    facts = {_PARTS[name]: f"{seconds / total:.1%}" for name, seconds in summary["part_seconds"].items()}
    if memory := summary["peak_memory_bytes"]:
        least = f"{min(memory) / GIB:.2f} to " if len(memory) > 1 else ""
        facts[f"Peak memory of {len(memory)} rank(s)"] = f"{least}{max(memory) / GIB:.2f} GiB"
    slowest = summary["slowest"]
    if slowest and len(memory) > 1:
        facts["Slowest rank"] = (
            f"{slowest['rank']}, in {slowest['share_of_steps']:.0%} of the steps, {slowest['over_mean'] - 1:.1%} over the mean"
        )
    return facts


def training_tile(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """How long training took, and how fast it was."""
    minutes, seconds = divmod(round(summary["train_seconds"]), 60)
    speed = f"{summary['tokens_per_second']:,.0f} tokens/s, MFU {summary['mfu']:.0%}"
    return "Training", f"{minutes} min {seconds} s", speed


def speed_facts(checkpoint: Manifest) -> Json:
    """What a summary says of a run's time and memory."""
    return {
        "train_seconds": checkpoint.info["train_seconds"],
        "tokens_per_second": checkpoint.info["median_tokens_per_second"],
        "mfu": checkpoint.info["median_mfu"],
        "part_seconds": checkpoint.info["part_seconds"],
        "peak_memory_bytes": checkpoint.info["peak_memory_bytes"],
        "slowest": checkpoint.info["slowest"],
    }


def _tiles(summary: Json) -> list[tuple[str, str, str]]:
    accuracies = f"{summary['accuracy_before']:.1%} → {summary['accuracy_after']:.1%}"
    return [
        ("Accuracy", accuracies, f"{summary['num_eval']} rows, p = {summary['p_value']:.2g}"),
        ("Loss", f"{summary['loss_first']:.3f} → {summary['loss_last']:.3f}", f"{summary['steps']} steps"),
        ("Trained tokens", f"{summary['num_targets']:,}", f"of {summary['num_tokens']:,}"),
        ("Packing", f"{summary['packing_efficiency']:.2%}", "of slots filled"),
        training_tile(summary),
    ]


def _score(name: str, report: EvalReport) -> Score:
    low, high = report.interval
    return Score(name, report.accuracy, low, high, report.loss)


def _samples(before: EvalReport, after: EvalReport, count: int) -> list[Sample]:
    """The first rows of the evaluation set with both answers."""
    earlier = {row.id: row for row in before.rows}
    return [
        Sample(
            prompt=row.prompt[:MAX_SHOWN_CHARS],
            expected=row.expected,
            before=earlier[row.id].answer[:MAX_SHOWN_CHARS],
            after=row.answer[:MAX_SHOWN_CHARS],
            before_correct=earlier[row.id].correct,
            after_correct=row.correct,
        )
        for row in after.rows[:count]
        if row.id in earlier
    ]
