"""A model with more tokens: rows of embedding and head are added, all that was there keeps its bits.

Letters: N added tokens, D model, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.config.vocabulary import VocabularyConfig
from lib.core.artifact import link_or_copy
from lib.core.errors import ModelError
from lib.core.manifest import file_sha256
from lib.core.transient import is_transient
from lib.models.hf_export import HEAD_FILES, generation_ends, write_json
from lib.models.hf_fallback import is_fallback, vocabulary_weights
from lib.models.hf_io import INDEX_FILE, CheckpointReader, checked_weight_map, read_json, read_spec
from lib.models.spec import DecoderSpec
from lib.models.weights import VOCABULARY_WEIGHTS
from lib.tokens.extend import check_additions, write_extended
from lib.tokens.rules import RULES_FILE
from lib.tokens.tokenizer import Tokenizer
from lib.tokens.vocab_plan import VocabPlan, plan_vocabulary

_MEAN_ROWS = 1 << 13
"""Rows that are added up at a time in float64."""


@dataclass(frozen=True)
class _NewRows:
    """How the rows of the added tokens are made; the same for embedding and head, each from its own old rows."""

    plan: VocabPlan
    described: dict[str, list[int]]
    """Token -> ids of its description."""
    vectors: dict[str, torch.Tensor]
    """"embed", "head" -> [number of semantic tokens, D]."""

    def grown(self, old_VD: torch.Tensor, num_rows: int, name: str) -> torch.Tensor:
        """[num_rows, D] in the dtype of old_VD: the old rows, and the added tokens' at their ids. A bias is [num_rows]."""
        if old_VD.ndim == 1:
            return self.grown(old_VD[:, None], num_rows, name)[:, 0]
        rows_VD = torch.zeros(num_rows, old_VD.shape[1], dtype=old_VD.dtype)
        rows_VD[: old_VD.shape[0]] = old_VD
        known_VD, ids = old_VD[: self.plan.base_size], self.plan.ids
        rows_VD[self.plan.base_size : self.plan.vocab_size] = _mean(known_VD).to(old_VD.dtype)
        for token, its_ids in self.described.items():
            rows_VD[ids[token]] = _mean(known_VD[its_ids]).to(old_VD.dtype)
        if name in self.vectors:
            rows_VD[ids[self.plan.semantic[0]] : self.plan.vocab_size] = self.vectors[name].to(old_VD.dtype)
        return rows_VD


def extend_model(source: Path, vocabulary: VocabularyConfig, out: Path, *, vectors: Path | None = None) -> dict[str, int]:
    """Write the model folder `source` to `out` with the tokens, roles and template of a vocabulary.

    Ids and rows that are there keep their values bit for bit; files without a changed tensor are linked. An embedding that
    has rows beyond the tokenizer's ids gets the added tokens there before it grows.

    Args:
        out: an existing, empty folder.
        vectors: the file that `vocabulary.vectors` names, on this machine.
    Returns: how many tokens were added, and how many got their row from a description, from vectors, from the mean.
    Raises:
        TokenizerError: a token can't be added; see `write_extended`.
        ModelError: the folder isn't a model, or the vectors aren't the ones that were named or don't fit.
    """
    reader = CheckpointReader(source)
    spec, places = _places(source, reader)
    tokenizer = Tokenizer.load(source)
    plan = _plan(tokenizer, vocabulary)
    new = _NewRows(
        plan,
        {token: _described(tokenizer, token, text) for token, text in vocabulary.descriptions.items()},
        _read_vectors(vocabulary, vectors, shape=(len(plan.semantic), spec.hidden_size), tied=spec.tied),
    )
    num_rows = _num_rows(spec.vocab_size, plan)
    replaced = {stored: new.grown(reader.get(stored), num_rows, name) for stored, name in places.items()}
    write_extended(tokenizer, plan, out, roles=_roles(vocabulary), chat_template=vocabulary.chat_template)
    _write_rest(source, out, vocab_size=num_rows)
    _write_weights(reader, out, replaced)
    num_given = len(plan.semantic) if new.vectors else 0
    return {
        "tokens_added": len(plan.tokens),
        "rows_described": len(new.described),
        "rows_given": num_given,
        "rows_mean": len(plan.tokens) - len(new.described) - num_given,
    }


def planned_rows(num_rows: int, vocabulary: VocabularyConfig, tokenizer: Tokenizer | None) -> int:
    """Ids of a model of `num_rows` once it is extended.

    Args:
        tokenizer: the model's; None: there is none to ask, and each row is taken for a token's, so that it may be fewer.
    Raises:
        TokenizerError: a token can't be added; see `write_extended`.
    """
    if tokenizer is None:
        return num_rows + len(vocabulary.special) + len(vocabulary.text_tokens)
    plan = _plan(tokenizer, vocabulary)
    check_additions(tokenizer, plan, _roles(vocabulary))
    return _num_rows(num_rows, plan)


def _num_rows(num_rows: int, plan: VocabPlan) -> int:
    return max(num_rows, plan.vocab_size)


def _plan(tokenizer: Tokenizer, vocabulary: VocabularyConfig) -> VocabPlan:
    earlier = VocabPlan.read(tokenizer.folder)
    return plan_vocabulary(
        tokenizer.vocab_size,
        special=vocabulary.special,
        semantic=vocabulary.text_tokens,
        known=earlier.known + earlier.semantic if earlier else (),
    )


def _roles(vocabulary: VocabularyConfig) -> dict[str, str]:
    roles = {"eos_token": vocabulary.eos_token, "pad_token": vocabulary.pad_token}
    return {role: token for role, token in roles.items() if token is not None}


def _places(source: Path, reader: CheckpointReader) -> tuple[DecoderSpec, dict[str, str]]:
    """The model's numbers; and name -> "embed", "head" or "bias" of each stored tensor that has a row for each id."""
    if is_fallback(source):
        return vocabulary_weights(source, reader)
    family, spec = read_spec(source)
    checked_weight_map(reader, family, spec)
    names = {stored: str(ours).partition(".")[0] for stored, ours in family.weight_names.items() if ours in VOCABULARY_WEIGHTS}
    return spec, {stored: "embed" if spec.tied else name for stored, name in names.items() if stored in reader.names()}


def _mean(rows_VD: torch.Tensor) -> torch.Tensor:
    """[D] float64."""
    total = torch.zeros(rows_VD.shape[1], dtype=torch.float64)
    for start in range(0, rows_VD.shape[0], _MEAN_ROWS):
        total += rows_VD[start : start + _MEAN_ROWS].double().sum(0)
    return total / rows_VD.shape[0]


def _described(tokenizer: Tokenizer, token: str, text: str) -> list[int]:
    ids = tokenizer.encode_text(text)
    if not ids:
        raise ModelError(f"vocabulary.descriptions: the text for {token!r} is {text!r}, which has no tokens; write some words")
    return ids


def _read_vectors(
    vocabulary: VocabularyConfig, path: Path | None, *, shape: tuple[int, int], tied: bool
) -> dict[str, torch.Tensor]:
    if not vocabulary.vectors:
        return {}
    where = f"vocabulary.vectors ({vocabulary.vectors})"
    if path is None or not path.is_file():
        raise ModelError(f"{where}: no such file; give the address of a safetensors file")
    if (found := file_sha256(path)) != vocabulary.vectors_digest:
        problem = "holds other bytes than vectors_digest says" if vocabulary.vectors_digest else "has no vectors_digest"
        raise ModelError(f"{where} {problem}; set vectors_digest: {found} to use what is there")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        if is_transient(error):
            raise
        raise ModelError(f"{where}: not a readable safetensors file: {error}") from error
    names = {"embed"} if tied else {"embed", "head"}
    if "embed" not in tensors or not tensors.keys() <= names:
        raise ModelError(
            f"{where}: holds {sorted(tensors)}; this model, whose head is {'' if tied else 'not '}tied, "
            f"takes {' and, if you have it, '.join(sorted(names))}"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ModelError(
                f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}; expected floats {list(shape)}, "
                "a row for each token of semantic and ranges"
            )
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{where}: {name} holds numbers that aren't finite")
    return tensors


def _write_rest(source: Path, out: Path, *, vocab_size: int) -> None:
    """Config and generation config, with the ids of the tokenizer in `out`; rules, output heads and papers as they are."""
    ends = generation_ends(out)
    write_json(out / "config.json", read_json(source / "config.json") | ends | {"vocab_size": vocab_size})
    if (source / "generation_config.json").is_file():
        write_json(out / "generation_config.json", read_json(source / "generation_config.json") | ends)
    for path in (*sorted(source.glob("LICENSE*")), *(source / name for name in ("README.md", RULES_FILE, *HEAD_FILES))):
        if path.is_file():
            link_or_copy(path.resolve(), out / path.relative_to(source))


def _write_weights(reader: CheckpointReader, out: Path, replaced: dict[str, torch.Tensor]) -> None:
    """The same files with the same tensors, but for those replaced."""
    more_parameters = more_bytes = 0
    for file, names in reader.files().items():
        if not replaced.keys() & set(names):
            link_or_copy((reader.folder / file).resolve(), out / file)
            continue
        tensors = {name: replaced[name] if name in replaced else reader.get(name) for name in names}
        for name in replaced.keys() & set(names):
            more = tensors[name].numel() - math.prod(reader.shape(name))
            more_parameters, more_bytes = more_parameters + more, more_bytes + more * tensors[name].itemsize
        save_file(tensors, out / file, metadata={"format": "pt"})
    if (reader.folder / INDEX_FILE).is_file():
        index = read_json(reader.folder / INDEX_FILE)
        totals = dict(index.get("metadata") or {})
        for key, more in (("total_size", more_bytes), ("total_parameters", more_parameters)):
            if key in totals:
                totals[key] += more
        write_json(out / INDEX_FILE, {"metadata": totals, "weight_map": index["weight_map"]})
