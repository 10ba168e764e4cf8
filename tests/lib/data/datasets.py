"""Data sets made for a test, through the real ingestion."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.core.artifact import stage_artifact
from lib.core.examples import Conversation
from lib.data.rows import ingest_dataset
from lib.data.table import ExampleTable


def row(number: int, answer: str) -> dict[str, Any]:
    """A row with id `r<number>`: one question, one answer."""
    messages = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]
    return {"id": f"r{number}", "messages": messages}


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in rows), encoding="utf-8")
    return path


def ingested(source: Path, target: Path) -> Path:
    """Ingest `source` into the artifact `target`, and return it."""
    with stage_artifact(target, "dataset") as staged:
        ingest_dataset(source, staged)
    return target


def table(folder: Path, rows: Sequence[object]) -> ExampleTable[Conversation]:
    return ExampleTable.open(ingested(write_jsonl(folder / "rows.jsonl", rows), folder / "dataset"), Conversation)
