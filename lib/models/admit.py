"""The gate that a model folder passes before anything trusts it: what is taken over, and what is checked."""

import fnmatch
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.config.vocabulary import VocabularyConfig
from lib.core.artifact import STAGING_PREFIX, Staged, link_or_copy
from lib.core.errors import ModelError
from lib.models.head_io import read_heads
from lib.models.hf_export import HEAD_FILES
from lib.models.hf_fallback import FAMILY, check_fallback, is_fallback
from lib.models.hf_io import CheckpointReader, checked_weight_map, read_json, read_spec
from lib.models.mxfp4 import decode_folder, is_mxfp4
from lib.models.spec import DecoderSpec
from lib.models.vocabulary import extend_model
from lib.tokens.rules import RULES_FILE
from lib.tokens.tokenizer import Tokenizer

KEPT_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json", "vocab_plan.json", RULES_FILE, "LICENSE*", "README.md"),
)
"""Everything else in a folder (code, pickles, other formats) stays behind."""


def prepare_model(source: Path, vocabulary: VocabularyConfig, staged: Staged, *, vectors: Path | None = None) -> None:
    """Admit a model folder with the tokens of a vocabulary; without any, the folder as it is, or decoded from MXFP4.

    Args:
        vectors: the file that `vocabulary.vectors` names, on this machine.
    Raises:
        ModelError, TokenizerError: see `admit_model`, `extend_model` and `decode_folder`.
    """
    if is_mxfp4(source):
        with _scratch(staged) as decoded:
            decode_folder(source, decoded)
            prepare_model(decoded, vocabulary, staged, vectors=vectors)
        return
    if vocabulary.is_empty:
        admit_model(source, staged)
        return
    with _scratch(staged) as extended:
        added = extend_model(source, vocabulary, extended, vectors=vectors)
        admit_model(extended, staged)
    staged.counts.update(added)


@contextmanager
def _scratch(staged: Staged) -> Iterator[Path]:
    """A folder on the file system of an artifact, so that files are linked from it; removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=staged.path.parent) as folder:
        yield Path(folder)


def admit_model(source: Path, staged: Staged) -> None:
    """Link the files of a Hugging Face model folder into a model artifact, after checking them.

    Checked: a known family, or a causal language model that transformers has, without remote code; safetensors with exactly
    the tensors that the config calls for; a tokenizer that loads, comes back exactly from a round trip and fits the
    vocabulary; special ids inside it.

    Raises:
        ModelError, TokenizerError: name the file, what is wrong with it, and the remedy.
    """
    family, spec, num_tensors = _checked_model(source)
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > spec.vocab_size:
        raise ModelError(f"{source}: the tokenizer has {tokenizer.vocab_size} ids but the embedding {spec.vocab_size} rows")
    for file in ("config.json", "generation_config.json"):
        if file == "config.json" or (source / file).is_file():
            _check_special_ids(source / file, spec.vocab_size)
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in KEPT_FILES):
            link_or_copy(path.resolve(), staged.path / path.name)
    for name in HEAD_FILES:
        if (source / name).is_file():
            link_or_copy((source / name).resolve(), staged.path / name)
    staged.counts.update(parameters=spec.num_parameters, tensors=num_tensors)
    staged.meta.update(format="huggingface", family=family, tokenizer=tokenizer.digest)


def _checked_model(source: Path) -> tuple[str, DecoderSpec, int]:
    """(name of the family, size, number of tensors)."""
    reader = CheckpointReader(source)
    if is_fallback(source):
        return FAMILY, check_fallback(source), len(reader.names())
    family, spec = read_spec(source)
    weights = checked_weight_map(reader, family, spec)
    read_heads(source)
    return family.name, spec, len(weights.stored_shapes())


def _check_special_ids(path: Path, vocab_size: int) -> None:
    values = read_json(path)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(key)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < vocab_size):
                raise ModelError(f"{path}: {key} {token_id!r} is not an id below the vocabulary size {vocab_size}")
