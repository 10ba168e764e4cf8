"""A data set tokenised once, for corpora that are used again: the same documents as on the fly, in the same order."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lib.config.data import DataConfig
from lib.core.artifact import Staged, read_manifest
from lib.core.errors import ConfigError
from lib.core.examples import Conversation
from lib.core.manifest import Json
from lib.data.examples import open_examples
from lib.data.stream import Encoding
from lib.data.tokenized import TokenizedExamples, finish, write_split
from lib.tokens.chat import ChatEncoder
from lib.tokens.rules import ChatRules
from lib.tokens.tokenizer import Tokenizer


def copy_tokenizer(model_dir: Path, staged: Staged) -> None:
    """Write the files of a model's tokenizer, byte for byte, so that other weights with the same tokenizer are the same input.

    Raises:
        TokenizerError: the tokenizer can't be used.
    """
    Tokenizer.load(model_dir).save(staged.path)


def tokenize_conversations(
    folder: Path, tokenizer_dir: Path, config: DataConfig, staged: Staged, progress: Callable[[int], None]
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
    encoding = Encoding.of_chat(ChatEncoder.of(Tokenizer.load(tokenizer_dir), config))
    sizes = []
    for split in range(source.num_splits):
        sizes.append(write_split(source, split, encoding, staged.path))
        progress(sizes[-1])
    finish(staged, source, encoding, sizes)
    staged.meta["rules"] = _rules(config)


def open_tokenized(folder: Path, tokenizer_dir: Path, config: DataConfig) -> TokenizedExamples:
    """A tokenised data set, if it holds what this configuration and tokenizer would make of its rows.

    Raises:
        ArtifactCorruptError: a file is missing or altered.
        DataError: the artifact holds something else.
        ConfigError: names what it was made with and what is asked for.
    """
    found = TokenizedExamples.open(folder)
    made = {**found.decided_by, **read_manifest(folder).meta["rules"]}
    asked = {"tokenizer": Tokenizer.load(tokenizer_dir).digest, **_rules(config)}
    changed = [f"{name} was {made.get(name)!r}, is {asked[name]!r}" for name in asked if made.get(name) != asked[name]]
    if changed:
        raise ConfigError(f"{folder}: was tokenised otherwise ({'; '.join(changed)}); tokenise the data set again")
    return found


def _rules(config: DataConfig) -> Json:
    return asdict(ChatRules.of(config))
