"""A data set tokenised once, for corpora that are used again: the same documents as on the fly, in the same order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib.config.chat import ChatConfig
from lib.config.rows import Kind
from lib.core.artifact import Staged
from lib.core.errors import ConfigError
from lib.core.examples import Conversation
from lib.data.document import Document
from lib.data.examples import open_examples
from lib.data.shuffle import ExampleSource
from lib.data.stream import Encoding
from lib.data.tokenized import TokenizedExamples, finish, write_split
from lib.tokens.chat import ChatEncoder
from lib.tokens.encoders import encode_completions
from lib.tokens.tokenizer import Tokenizer


def copy_tokenizer(model_dir: Path, staged: Staged) -> None:
    """Write the files of a model's tokenizer, byte for byte, so that other weights with the same tokenizer are the same input.

    Raises:
        TokenizerError: the tokenizer can't be used.
    """
    Tokenizer.load(model_dir).save(staged.path)


def tokenize_conversations(
    folder: Path, tokenizer_dir: Path, config: ChatConfig, staged: Staged, progress: Callable[[int], None]
) -> None:
    """Tokenise a data set of conversations, split by split.

    Args:
        folder: the data set's artifact.
        staged: gets a file for each split, and in `meta` the rules and the tokenizer that decided its tokens and masks.
        progress: called with the number of rows done since the last call.
    Raises:
        DataError: the artifact holds something else, or a row can't be tokenised.
    """
    source = open_examples(folder, Conversation, kind="conversation")
    encoder = ChatEncoder.of(Tokenizer.load(tokenizer_dir), config)
    encoding = Encoding.of_chat(encoder)
    sizes = []
    for split in range(source.num_splits):
        sizes.append(write_split(source, split, encoding, staged.path))
        progress(sizes[-1])
    finish(staged, source, encoding, sizes, asdict(encoder.rules))


def encoding_of(encoder: ChatEncoder, sources: Mapping[str, ExampleSource], kind: Kind = "conversation") -> Encoding:
    """Conversations are encoded, and what was tokenised before is passed on, so that a mixture may hold both. Or completions.

    Raises:
        ConfigError: a source was tokenised by another tokenizer or by other rules; names it, and both values.
    """
    if kind == "completion":
        return _of_completions(encoder)
    fresh = Encoding.of_chat(encoder)
    tokenized = {name: source for name, source in sources.items() if isinstance(source, TokenizedExamples)}
    if not tokenized:
        return fresh
    for name, source in tokenized.items():
        _check_made_alike(name, source, encoder)

    def encode(examples: Sequence[Any]) -> list[Document]:
        rows = [example for example in examples if not isinstance(example, Document)]
        made = iter(fresh.encode(rows) if rows else ())
        return [example if isinstance(example, Document) else next(made) for example in examples]

    return Encoding(encode, fresh.decided_by)


def _of_completions(encoder: ChatEncoder) -> Encoding:
    def encode(examples: Sequence[Any]) -> list[Document]:
        found = zip(encode_completions(encoder, examples), examples, strict=True)
        return [Document.of(encoded, example.labels) for encoded, example in found]

    return Encoding(encode, Encoding.of_chat(encoder).decided_by)


def _check_made_alike(name: str, source: TokenizedExamples, encoder: ChatEncoder) -> None:
    made = {**source.decided_by, **source.rules}
    asked = {**Encoding.of_chat(encoder).decided_by, **asdict(encoder.rules)}
    changed = [f"{what} was {made.get(what)!r}, is {asked[what]!r}" for what in asked if made.get(what) != asked[what]]
    if changed:
        raise ConfigError(f"source {name!r} was tokenised otherwise ({'; '.join(changed)}); tokenise its data set again")
