"""Laws of the chat feed: threads, processes and no workers at all give the same rows of the same conversations."""

import json
from pathlib import Path

from lib.config.data import DataConfig
from lib.data.document import PackedRow
from lib.data.feed import ChatFeed
from lib.data.prefetch import Prefetcher
from lib.data.stream import StepRows
from lib.tokens.chat import ChatEncoder
from tests.lib.data.datasets import row, write_jsonl


def _contents(step: StepRows) -> list[list[tuple[str, list[int], list[bool]]]]:
    def content(packed: PackedRow) -> list[tuple[str, list[int], list[bool]]]:
        return [(d.sample_id, d.token_ids.tolist(), d.loss_mask.tolist()) for d in packed.documents]

    return [content(packed) for packed in step.rows]


def test_every_kind_of_worker_feeds_the_same(tmp_path: Path, encoder: ChatEncoder) -> None:
    """[F3] Rows straight from a file, one rank of two; each kind goes on where the one before it stopped."""
    path = write_jsonl(tmp_path / "rows.jsonl", [row(n, "ab 12 " * (n % 19 + 1)) for n in range(60)])
    changes = [{"workers": 0}, {"workers": 2}, {"workers": 1, "worker_kind": "process"}, {"workers": 0}]
    found, state = [], None
    for change in changes:
        config = DataConfig.parse({"num_streams": 4, "open_packs": 3, **change}, where="test")
        chats = ChatFeed(config, str(path), str(encoder.tokenizer.folder), 256, 4)
        feed = Prefetcher(chats.producers(encoder, rank=1, num_ranks=2), _contents, 2 if config.workers else 0)
        if state:
            feed.load_state(state)
        with feed:
            found += [feed.next_step() for _ in range(4)]
            state = json.loads(json.dumps(feed.position().to_json()))
    config = DataConfig(num_streams=4, open_packs=3, workers=0)
    plain = ChatFeed(config, str(path), str(encoder.tokenizer.folder), 256, 4).producers(encoder, rank=1, num_ranks=2)[0]
    assert found == [_contents(plain.next_step()) for _ in range(16)]
