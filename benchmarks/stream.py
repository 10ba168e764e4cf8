"""Streaming: rows a CPU second from files to packed tensors, and what a kill loses or repeats.

`python -m benchmarks stream [--rows 4000] [--rounds 3] [--kills 20] [--tokenizer FOLDER]`, one thread, CPU time.

Two pipelines end in packed batches. `text`: JSON lines are decoded, checked, encoded with masks, packed and laid out as
tensors; beside it the tokenizer alone, given the same rendered texts in batches of 1,000. `tokens`: stored tokens are read,
shuffled, packed and laid out; beside it Hugging Face `datasets` streaming the same Arrow shards row by row, and doing no more.

Then a stream of the same rows is killed at random steps and resumed from its last state: rows lost and repeated against the
order of a run that was never stopped; beside it `datasets` with its shuffle buffer and its own state_dict.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets

from benchmarks.floor import measure_floor
from benchmarks.report import Report, interleaved_cpu_seconds, medians, say
from lib.config.data import DataConfig
from lib.core.artifact import stage_artifact
from lib.core.examples import Conversation
from lib.data.batch import collate
from lib.data.examples import open_examples
from lib.data.mixture import OWN_DATA
from lib.data.shuffle import ExampleSource
from lib.data.stream import Encoding, PackedStream
from lib.data.tokenized import TokenizedExamples, finish, write_split
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer

SEQUENCE_LENGTH, ROWS_PER_STEP = 2048, 8
CONFIG = DataConfig(num_streams=8, open_packs=16, shuffle_rows=256, long_rows="truncate")
MEAN_WORDS, MOST_WORDS = 150, 1200
BATCH_ROWS = 1000
HF_BUFFER = 1000
TOKENIZER = Path(".quickstart/smollm2")


def write_rows(path: Path, num_rows: int) -> None:
    """Conversations of English text, of lognormal lengths, the same every time."""
    words = " ".join(topics.values()).split()
    source = random.Random(0)

    def text(num_words: int) -> str:
        start = source.randrange(len(words) - num_words)
        return " ".join(words[start : start + num_words])

    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            length = min(MOST_WORDS, max(4, int(source.lognormvariate(0.0, 1.0) * MEAN_WORDS / 1.65)))
            messages = [{"role": "user", "content": text(1 + length // 4)}, {"role": "assistant", "content": text(length)}]
            file.write(json.dumps({"id": f"r{number}", "messages": messages}) + "\n")


def tokenized(source: ExampleSource, encoding: Encoding, folder: Path) -> TokenizedExamples:
    with stage_artifact(folder, "dataset") as staged:
        rows = [write_split(source, split, encoding, staged.path) for split in range(source.num_splits)]
        finish(staged, source, encoding, rows)
    return TokenizedExamples.open(folder)


class Runner:
    """A stream past its start-up, advanced by a number of rows at a time, tensors and all."""

    def __init__(self, source: ExampleSource, encoding: Encoding) -> None:
        self.stream = PackedStream(
            {OWN_DATA: source}, encoding, CONFIG, sequence_length=SEQUENCE_LENGTH, rows_per_step=ROWS_PER_STEP
        )
        self.num_rows = 0
        self.advance(CONFIG.num_streams * CONFIG.open_packs)

    def advance(self, num_rows: int) -> None:
        """Until so many further rows were given out."""
        goal = self.num_rows + num_rows
        while self.num_rows < goal:
            rows = self.stream.next_step().rows
            collate(rows, SEQUENCE_LENGTH, 0)
            self.num_rows += sum(len(row.documents) for row in rows)


def hf_stream(folder: Path) -> Any:
    """`datasets` streaming of the same shards."""
    files = [str(path) for path in sorted(folder.glob("tokens-*.arrow"))]
    return datasets.load_dataset("arrow", data_files=files, split="train", streaming=True)


def read_all(rows: Iterable[Any]) -> None:
    """Row by row, as Python values."""
    for _ in rows:
        pass


def our_kills(source: ExampleSource, encoding: Encoding, num_kills: int, seed: int) -> tuple[int, int]:
    """(lost, repeated) rows over random kills of a stream that checkpoints at random steps."""
    chance = random.Random(seed)

    def fresh() -> PackedStream:
        return PackedStream({OWN_DATA: source}, encoding, CONFIG, sequence_length=SEQUENCE_LENGTH, rows_per_step=ROWS_PER_STEP)

    def ids(stream: PackedStream, num_steps: int) -> list[str]:
        return [name for _ in range(num_steps) for row in stream.next_step().rows for name in row.sample_ids]

    whole, killed = fresh(), fresh()
    expected: list[str] = []
    found: list[str] = []
    for _ in range(num_kills):
        num_steps = chance.randint(1, 6)
        expected += ids(whole, num_steps)
        found += ids(killed, num_steps)
        state = json.loads(json.dumps(killed.state()))
        ids(killed, chance.randint(0, 3))  # done after the checkpoint, lost with the kill
        killed = fresh()
        killed.load_state(state)
    return _difference(expected, found)


def hf_kills(path: Path, num_rows: int, num_kills: int, seed: int) -> tuple[int, int]:
    """The same of `datasets`: shuffle with its buffer, state_dict and load_state_dict, over one pass of the rows."""
    chance = random.Random(seed)

    def fresh() -> Any:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
        return rows.shuffle(seed=0, buffer_size=min(HF_BUFFER, num_rows // 4))

    expected = [row["id"] for row in fresh()]
    found: list[str] = []
    rows = fresh()
    for left in range(num_kills, 0, -1):
        most = max(1, (num_rows - len(found)) // (left + 1))
        found += [row["id"] for row in islice(rows, chance.randint(1, most))]
        state = rows.state_dict()
        rows = fresh()
        rows.load_state_dict(state)
    found += [row["id"] for row in rows]
    return _difference(expected, found)


def _difference(expected: Sequence[str], found: Sequence[str]) -> tuple[int, int]:
    """Rows of a run that should have come and didn't, and the other way round; 0 + 0 only if the order is right as well."""
    lost, repeated = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    if not lost and not repeated and list(expected) != list(found):
        raise AssertionError("all rows came, in another order")
    return lost.total(), repeated.total()


def race(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Rows a CPU second of every variant."""
    path = folder / "rows.jsonl"
    write_rows(path, options.rows)
    tokenizer = Tokenizer.load(options.tokenizer)
    encoder = ChatEncoder(tokenizer)
    source = open_examples(path, Conversation, kind="conversation")
    say("tokenising once, for the stored tokens and the texts of the tokenizer alone")
    tokens = tokenized(source, Encoding.of_chat(encoder), folder / "tokens")
    texts = [
        tokenizer.decode(row.example.token_ids.tolist()) for split in range(tokens.num_splits) for row in tokens.read(split)
    ]
    text_run, token_run = Runner(source, Encoding.of_chat(encoder)), Runner(tokens, tokens.encoding)

    def raw() -> None:
        for start in range(0, len(texts), BATCH_ROWS):
            tokenizer.backend.encode_batch(texts[start : start + BATCH_ROWS])

    passes, hf_rows = options.token_passes, hf_stream(folder / "tokens")
    variants: dict[str, tuple[int, Callable[[], None]]] = {
        "text": (options.rows, lambda: text_run.advance(options.rows)),
        "raw_tokenizer": (options.rows, raw),
        "tokens": (passes * options.rows, lambda: token_run.advance(passes * options.rows)),
        "hf_rows": (options.rows, lambda: read_all(hf_rows)),
    }
    seconds = medians(interleaved_cpu_seconds({name: run for name, (_, run) in variants.items()}, rounds=options.rounds))
    return {name: num_rows / seconds[name] for name, (num_rows, _) in variants.items()}


def main(arguments: Sequence[str]) -> None:
    """Race, kill, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks stream")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--token-passes", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    floor = measure_floor()
    with tempfile.TemporaryDirectory(prefix="postflyte-stream-") as name:
        folder = Path(name)
        rates = race(folder, options)
        say(f"{options.kills} random kills")
        tokens = TokenizedExamples.open(folder / "tokens")
        lost, repeated = our_kills(tokens, tokens.encoding, options.kills, seed=0)
        hf_lost, hf_repeated = hf_kills(folder / "rows.jsonl", options.rows, options.kills, seed=0)
    report = Report("stream", details={"options": {**vars(options), "tokenizer": str(options.tokenizer)}})
    report.ours = {
        "text_rows_per_s": rates["text"],
        "token_rows_per_s": rates["tokens"],
        "rows_lost": lost,
        "rows_repeated": repeated,
    }
    report.ours["no_row_lost_or_repeated"] = float(lost + repeated == 0)
    report.peers = {
        "raw_tokenizer": {"text_rows_per_s": rates["raw_tokenizer"]},
        "hf_datasets": {"token_rows_per_s": rates["hf_rows"], "rows_lost": hf_lost, "rows_repeated": hf_repeated},
    }
    report.compare("text_rows_per_s", "raw_tokenizer", smaller_is_better=False, target=0.95)
    report.compare("token_rows_per_s", "hf_datasets", smaller_is_better=False, target=5.0)
    report.targets["no_row_lost_or_repeated"] = 1.0
    report.print(floor)
