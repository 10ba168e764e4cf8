"""Output heads in a model folder: as transformers' sequence classifier where that is the same, else in a folder beside.

heads/heads.json says what there is. A head that is alone, with one output a document, is stored in the model's own files under
the architecture that transformers has for it. Other heads lie in heads/heads.safetensors, which neither transformers nor vLLM
reads: they open the language model of such a folder as any other, also where it was not trained.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.config.heads import HeadConfig, HeadsConfig
from lib.core.errors import ConfigError, ModelError
from lib.core.transient import is_transient
from lib.models.families import CLASSIFIER_HEAD
from lib.models.hf_export import HEAD_FILES, write_hf_folder, write_json
from lib.models.hf_io import CheckpointReader, read_json, read_spec
from lib.models.weights import WeightMap
from lib.tokens.chat import ChatEncoder

CONFIG_FILE, WEIGHTS_FILE = HEAD_FILES


@dataclass(frozen=True)
class SavedHeads:
    """The heads of a folder."""

    config: HeadsConfig
    weights: dict[str, torch.Tensor]
    """Name -> [O, D] as stored, of all heads but the language model's."""


def write_headed_folder(
    out: Path,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    heads: Mapping[str, torch.Tensor],
    config: HeadsConfig,
    source_folder: Path,
    *,
    dtype: torch.dtype | None = None,
    chat: ChatEncoder | None = None,
) -> None:
    """Write a decoder with its heads.

    Args:
        out, named_tensors, source_folder, dtype, chat: see `write_hf_folder`.
        heads: name -> weight [O, D].
    """
    alone, (family, spec) = config.alone, read_spec(source_folder)
    tensors = _with_classifier(named_tensors, heads[alone.name]) if alone else named_tensors
    if not alone and config.lm is None and not spec.tied:
        tensors = _with_language_head(named_tensors, family.weight_map(spec), CheckpointReader(source_folder))
    write_hf_folder(out, tensors, source_folder, dtype=dtype, chat=chat)
    (out / CONFIG_FILE).parent.mkdir(exist_ok=True)
    write_json(out / CONFIG_FILE, config.model_dump(mode="json"))
    values = read_json(out / "config.json")
    if alone:
        (out / WEIGHTS_FILE).unlink(missing_ok=True)  # of the source's heads
        write_json(out / "config.json", values | _classifier_values(family.classifier, alone))
        return
    write_json(out / "config.json", values | {"architectures": [family.architectures[0]]})
    whole = {name: weight.detach().to("cpu", torch.float32).contiguous() for name, weight in heads.items()}
    save_file(whole, out / WEIGHTS_FILE, metadata={"format": "pt"})


def check_storable(config: HeadsConfig, folder: Path) -> None:
    """Raises ConfigError where these heads of a folder's model can't be written by `write_headed_folder`."""
    _, spec = read_spec(folder)
    if config.alone is None and not spec.lm_head and not spec.tied:
        raise ConfigError(
            f"config.heads: {folder} is a sequence classifier, without the output matrix of the vocabulary that a folder with "
            "several heads holds; train one head, or begin with the model that it was made from"
        )


def _with_classifier(
    named_tensors: Iterable[tuple[str, torch.Tensor]], weight: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    yield from named_tensors
    yield CLASSIFIER_HEAD, weight


def _with_language_head(
    named_tensors: Iterable[tuple[str, torch.Tensor]], weights: WeightMap, reader: CheckpointReader
) -> Iterator[tuple[str, torch.Tensor]]:
    """The source's, which wasn't trained, so that what lies below the heads stays a language model."""
    yield from named_tensors
    (name,) = weights.entries["head.weight"].names
    yield name, reader.get(name)


def _classifier_values(architecture: str, head: HeadConfig) -> dict[str, Any]:
    """What config.json says of a sequence classifier."""
    labels = head.labels or (head.name,)
    return {
        "architectures": [architecture],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "regression" if head.kind == "scalar" else "single_label_classification",
    }


def read_heads(folder: Path) -> SavedHeads | None:
    """The heads of a model folder, None where it has none; also of a sequence classifier that transformers wrote.

    Raises:
        ModelError: what heads.json says is not there.
    """
    _, spec = read_spec(folder)
    path = folder / CONFIG_FILE
    if not path.is_file() and spec.lm_head:
        return None
    config = HeadsConfig.parse(read_json(path), where=str(path)) if path.is_file() else _of_classifier(folder)
    if not spec.lm_head:
        assert config.alone is not None, f"{path}: a sequence classifier has one head"
        weights = {config.alone.name: CheckpointReader(folder).get(CLASSIFIER_HEAD)}
    else:
        weights = _read_weights(folder / WEIGHTS_FILE)
    expected = {head.name: (head.num_outputs, spec.hidden_size) for head in config.outputs}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        raise ModelError(f"{folder}: its heads have the shapes {found}, {CONFIG_FILE} gives {expected}")
    return SavedHeads(config, weights)


def matching_weights(saved: SavedHeads, config: HeadsConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of those heads that a run has too.

    Raises:
        ModelError: the folder has a head that the run lacks or has for other outputs, so that it would be lost.
    """
    wanted = {head.name: head for head in config.outputs}
    for head in saved.config.outputs:
        ours = wanted.get(head.name)
        if ours is None:
            raise ModelError(
                f"{folder}: has a head {head.name!r}, the run has {sorted(wanted)}; name it too, or delete the folder "
                "heads/ there to start without"
            )
        if ours.definition != head.definition:
            raise ModelError(
                f"{folder}: its head {head.name!r} is {head.definition}, in the run it is {ours.definition}; give the run's "
                "another name"
            )
    return dict(saved.weights)


def _of_classifier(folder: Path) -> HeadsConfig:
    """From transformers' config: several labels are classes, a single one is a number."""
    labels = read_json(folder / "config.json").get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    head = (
        {"name": "score", "kind": "scalar"} if len(names) == 1 else {"name": "score", "kind": "classification", "labels": names}
    )
    return HeadsConfig.parse({"heads": [head]}, where=str(folder / "config.json"))


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        if is_transient(error):
            raise
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
