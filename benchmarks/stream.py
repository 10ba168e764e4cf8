"""Streaming: rows a CPU second from files to packed tensors, and what a kill loses or repeats.

`python -m benchmarks stream [--rows 4000] [--rounds 3] [--kills 20] [--unseen .05] [--tokenizer FOLDER]`, one thread, CPU time.

Two pipelines end in packed batches. `text`: JSON lines are decoded, checked, encoded with masks, packed and laid out as
tensors; beside it the tokenizer alone (`encode_batch`, and `encode_batch_fast`, which finds no character offsets), given the
same rendered texts in batches of 1,000. The texts are English prose of some 9,000 words, in which `unseen` of the words are
made up. Each round has texts of its own, so neither the tokenizer nor our encoder of words has met those before. `tokens`:
stored tokens are read, shuffled, packed and laid out; beside it Hugging Face `datasets` streaming the same Arrow shards row by
row, and doing no more.

Before that a process that reads these rows is killed (SIGKILL) at random moments and its successor resumes from the last
position put down (see killing.py): rows lost and repeated against the order of a run that nobody stopped; beside it
`datasets` with a shuffle buffer of the size of our shuffle blocks and its own state_dict.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics
from string import ascii_lowercase
from typing import Any

import datasets

from benchmarks.floor import measure_floor
from benchmarks.killing import MOST_STEPS, Reader, lost_and_repeated
from benchmarks.report import Report, interleaved_cpu_seconds, medians, say
from lib.config.data import DataConfig
from lib.core.artifact import stage_artifact
from lib.core.examples import Conversation
from lib.data.batch import collate
from lib.data.examples import open_examples
from lib.data.mixture import OWN_DATA
from lib.data.prefetch import Prefetcher
from lib.data.shuffle import ExampleSource
from lib.data.stream import Encoding, PackedStream
from lib.data.tokenized import TokenizedExamples, finish, write_split
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer

SEQUENCE_LENGTH, ROWS_PER_STEP = 2048, 8
CONFIG = DataConfig(num_streams=8, open_packs=16, shuffle_rows=256, long_rows="truncate")
MEAN_WORDS, MOST_WORDS, UNSEEN = 150, 1200, 0.05
BATCH_ROWS = 1000
HF_STEP_ROWS = 8
TOKENIZER = Path(".quickstart/smollm2")


def write_rows(path: Path, num_rows: int, unseen: float = UNSEEN) -> None:
    """Conversations of English text, of lognormal lengths, the same every time.

    Args: unseen: share of the words that are made up.
    """
    words = " ".join(topics.values()).split()
    source = random.Random(0)

    def made_up() -> str:
        return "".join(source.choices(ascii_lowercase, k=source.randint(3, 9)))

    def text(num_words: int) -> str:
        start = source.randrange(len(words) - num_words)
        return " ".join(made_up() if source.random() < unseen else word for word in words[start : start + num_words])

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


class OurReader:
    """The packed stream, prepared in a thread some steps ahead; its position is that of the step given out."""

    def __init__(self, source: ExampleSource, encoding: Encoding) -> None:
        stream = PackedStream({OWN_DATA: source}, encoding, CONFIG, sequence_length=SEQUENCE_LENGTH, rows_per_step=1)
        self._feed = Prefetcher([stream], lambda step: step, CONFIG.prefetch_batches)

    def load_state(self, state: dict[str, Any]) -> None:
        self._feed.load_state(state)

    def next_step(self) -> list[str]:
        return [name for row in self._feed.next_step().rows for name in row.sample_ids]

    def state(self) -> dict[str, Any]:
        return self._feed.position().to_json()


class HfReader:
    """`datasets` over the same shards, with its shuffle buffer and its own state_dict; one pass."""

    def __init__(self, folder: Path) -> None:
        self._rows = hf_stream(folder).shuffle(seed=0, buffer_size=CONFIG.shuffle_rows)
        self._iterator: Iterator[Any] | None = None

    def load_state(self, state: dict[str, Any]) -> None:
        self._rows.load_state_dict(state)

    def next_step(self) -> list[str]:
        self._iterator = self._iterator or iter(self._rows)
        return [row["id"] for row in islice(self._iterator, HF_STEP_ROWS)]

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self._rows.state_dict()
        return found


def kills(folder: Path, num_kills: int) -> dict[str, dict[str, float]]:
    """Whose reader -> kills, rows lost and rows repeated."""
    tokens = TokenizedExamples.open(folder / "tokens")
    readers: dict[str, Callable[[], Reader]] = {
        "ours": lambda: OurReader(tokens, tokens.encoding),
        "hf_datasets": lambda: HfReader(folder / "tokens"),
    }
    num_steps = 2 * num_kills * MOST_STEPS
    found = {}
    for name, open_reader in readers.items():
        say(f"{num_kills} random kills: {name}")
        counts = lost_and_repeated(open_reader, folder / name, num_kills=num_kills, num_steps=num_steps, seed=0)
        found[name] = dict(zip(("kills", "rows_lost", "rows_repeated"), map(float, counts)))
    return found


@dataclass(frozen=True)
class Prepared:
    """What is raced: the same rows as files of JSON lines and of tokens, and as texts."""

    tokenizer: Tokenizer
    source: ExampleSource
    encoding: Encoding
    tokens: TokenizedExamples
    texts: list[str]

    @staticmethod
    def of(folder: Path, options: argparse.Namespace) -> "Prepared":
        path = folder / "rows.jsonl"
        write_rows(path, options.rows * (options.rounds + 1), options.unseen)
        say("tokenising once, for the stored tokens and the texts of the tokenizer alone")
        tokenizer = Tokenizer.load(options.tokenizer)
        encoding = Encoding.of_chat(ChatEncoder(tokenizer))
        source = open_examples(path, Conversation, kind="conversation")
        tokens = tokenized(source, encoding, folder / "tokens")
        ids = [row.example.token_ids.tolist() for split in range(tokens.num_splits) for row in tokens.read(split)]
        return Prepared(tokenizer, source, encoding, tokens, list(map(tokenizer.decode, ids)))


def race(given: Prepared, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Rows a CPU second of every variant."""
    text_run, token_run = Runner(given.source, given.encoding), Runner(given.tokens, given.tokens.encoding)
    passes, hf_rows = options.token_passes, hf_stream(folder / "tokens")

    def raw(encode: Callable[..., object]) -> Callable[[], None]:
        rest = cycle(given.texts)

        def run() -> None:
            texts = list(islice(rest, options.rows))
            for start in range(0, len(texts), BATCH_ROWS):
                encode(texts[start : start + BATCH_ROWS], add_special_tokens=False)

        return run

    variants: dict[str, tuple[int, Callable[[], None]]] = {
        "text": (options.rows, lambda: text_run.advance(options.rows)),
        "raw_tokenizer": (options.rows, raw(given.tokenizer.backend.encode_batch)),
        "raw_tokenizer_without_offsets": (options.rows, raw(given.tokenizer.backend.encode_batch_fast)),
        "tokens": (passes * options.rows, lambda: token_run.advance(passes * options.rows)),
        "hf_rows": (len(given.texts), lambda: read_all(hf_rows)),
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
    parser.add_argument("--unseen", type=float, default=UNSEEN)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    floor = measure_floor()
    with tempfile.TemporaryDirectory(prefix="postflyte-stream-") as name:
        given = Prepared.of(Path(name), options)
        killed = kills(Path(name), options.kills)  # before anything has started a thread
        rates = race(given, Path(name), options)
    report = Report("stream", details={"options": {**vars(options), "tokenizer": str(options.tokenizer)}})
    report.ours = {"text_rows_per_s": rates["text"], "token_rows_per_s": rates["tokens"], **killed["ours"]}
    report.ours["no_row_lost_or_repeated"] = float(killed["ours"]["rows_lost"] + killed["ours"]["rows_repeated"] == 0)
    report.peers = {
        "raw_tokenizer": {"text_rows_per_s": rates["raw_tokenizer"]},
        "raw_tokenizer_without_offsets": {"text_rows_per_s": rates["raw_tokenizer_without_offsets"]},
        "hf_datasets": {"token_rows_per_s": rates["hf_rows"], **killed["hf_datasets"]},
    }
    report.compare("text_rows_per_s", "raw_tokenizer", smaller_is_better=False, target=0.95)
    report.compare("text_rows_per_s", "raw_tokenizer_without_offsets", smaller_is_better=False)
    report.compare("token_rows_per_s", "hf_datasets", smaller_is_better=False, target=5.0)
    report.targets["no_row_lost_or_repeated"] = 1.0
    report.print(floor)
