"""The packed rows of conversations that a rank trains on, from whatever workers the configuration asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lib.config.data import DataConfig
from lib.config.rows import Kind
from lib.core.manifest import Json
from lib.data.document import Document
from lib.data.examples import open_examples, open_mixture
from lib.data.mixture import OWN_DATA
from lib.data.prefetch import RowProducer
from lib.data.produce import ProcessProducer
from lib.data.schemas.arrow import TYPE_OF
from lib.data.stream import PackedStream, Share
from lib.data.tokenize import encoding_of
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatFeed:
    """Where the conversations are, and how they become rows."""

    config: DataConfig
    own_data: str
    """The run's own data: path of a data set, tokenised or not, or address of rows."""
    model_dir: str
    """Holds the tokenizer."""
    sequence_length: int
    rows_per_step: int
    """Over all ranks."""
    kind: Kind = "conversation"
    """Of the examples; or "completion"."""

    def producers(self, encoder: ChatEncoder, *, rank: int, num_ranks: int) -> Sequence[RowProducer]:
        """One for each background worker of a rank; a single one where there are none.

        Args:
            encoder: of `model_dir` and `config`; processes make their own.
        Raises:
            ConfigError, DataError: see PackedStream, `open_mixture`.
        """
        num_workers = max(1, self.config.workers)
        shares = [Share(rank, num_ranks, worker, num_workers) for worker in range(num_workers)]
        if self.config.workers and self.config.worker_kind == "process":
            arguments = {**vars(self), "config": self.config.model_dump(mode="json")}
            return [ProcessProducer(open_chat_stream, arguments, share) for share in shares]
        return self.streams(encoder, shares)

    def streams(self, encoder: ChatEncoder, shares: Sequence[Share]) -> list[PackedStream]:
        """The streams of some shares, in this process."""
        sources = open_mixture(self.config, self.own_data, TYPE_OF[self.kind], kind=self.kind)
        encoding = encoding_of(encoder, sources, self.kind)
        sizes = {"sequence_length": self.sequence_length, "rows_per_step": self.rows_per_step}
        return [PackedStream(sources, encoding, self.config, **sizes, share=share) for share in shares]

    def first_documents(self, encoder: ChatEncoder, num_rows: int) -> list[Document]:
        """The first rows of the run's own data, in the order of its files."""
        source = open_examples(self.own_data, TYPE_OF[self.kind], kind=self.kind)
        rows = (row.example for split in range(source.num_splits) for row in source.read(split))
        return list(encoding_of(encoder, {OWN_DATA: source}, self.kind).encode(list(islice(rows, num_rows))))


def open_chat_stream(arguments: Json, share: Share) -> PackedStream:
    """The stream of a share, in a process of its own; `arguments` are a ChatFeed as plain values."""
    feed = ChatFeed(**{**arguments, "config": DataConfig.parse(arguments["config"], where="data")})
    encoder = ChatEncoder.of(Tokenizer.load(Path(feed.model_dir)), feed.config)
    return feed.streams(encoder, [share])[0]
