"""A causal language model of transformers that has no family here: its code computes, and the documents stay explicit.

It gets a mask and positions for every row and keeps no cache. One document in a row, padded at the end, is compared with the
document alone before anything is trained; several in a row are compared too, and refused where they are not the same.
"""

import inspect
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lib.core.errors import NO_REMOTE_CODE, ModelError
from lib.core.transient import is_transient
from lib.models.families import FAMILIES
from lib.models.hf_export import COPIED_FILES, generation_ends, to_store, write_json
from lib.models.hf_io import CheckpointReader, read_json, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.spec import DecoderSpec, Rope
from lib.tokens.chat import ChatEncoder

FAMILY = "transformers"
"""In the place of a family's name."""
_MEMORY_KEYS = ("sliding_window", "attention_chunk_size", "layers_block_type", "conv_L_cache", "state_size", "mamba_d_state")
"""Config keys of layers that mix tokens by other rules than a mask; packing can't be told from short documents."""


class FallbackModel(nn.Module):
    """Logits of a transformers model for rows of documents."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.spec = size_of(model.config)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, token_ids_BT: torch.Tensor, positions_BT: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
        """[B, T, V] logits, without meaning on padding. Shapes as in `Decoder.forward`."""
        ids_BT = layout.document_ids_BT.to(token_ids_BT.device)
        positions = {"position_ids": positions_BT} if self.takes_positions else {}
        several = len(layout.spans) > len({span.row for span in layout.spans})
        mask = _block_mask(ids_BT) if several else (ids_BT >= 0).long()
        logits: torch.Tensor = self.model(input_ids=token_ids_BT, attention_mask=mask, use_cache=False, **positions).logits
        return logits


def _block_mask(ids_BT: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, T] float32: 0 where a query sees a key, the least number elsewhere; padding sees itself."""
    num_tokens = ids_BT.shape[1]
    causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=ids_BT.device).tril()
    sees_BTT = (ids_BT[:, :, None] == ids_BT[:, None, :]) & causal_TT
    return torch.where(sees_BTT, 0.0, torch.finfo(torch.float32).min)[:, None]


def is_fallback(folder: Path) -> bool:
    """Whether a model folder is of no family here."""
    return read_json(folder / "config.json").get("model_type") not in FAMILIES


def read_size(folder: Path) -> DecoderSpec:
    """Numbers of any model folder: its family's, or those that `size_of` finds."""
    return load_fallback(folder, device="meta").spec if is_fallback(folder) else read_spec(folder)[1]


def check_fallback(folder: Path) -> DecoderSpec:
    """Size of a folder's model.

    Raises:
        ModelError: code of its own, quantised weights, or no causal language model of the installed transformers.
    """
    config = read_json(folder / "config.json")
    kind, architectures = config.get("model_type"), config.get("architectures")
    if config.get("auto_map"):
        raise ModelError(f"{folder / 'config.json'}: {NO_REMOTE_CODE}")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(kind))
    if known is None or architectures != [known]:
        theirs = f"has {known} for it" if known else "knows no causal language model of this type"
        raise ModelError(
            f"{folder}: model_type {kind!r} with architectures {architectures!r} is of no family here, and the installed "
            f"transformers {theirs}; give another model, or see docs/add-a-model.md"
        )
    if config.get("quantization_config") or config.get("is_encoder_decoder"):
        raise ModelError(f"{folder}: quantised weights and encoder-decoders are not trained; give a decoder with float weights")
    return load_fallback(folder, device="meta").spec


def load_fallback(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, attention: str | None = None
) -> FallbackModel:
    """The model of a folder in `dtype`; on the meta device without reading its weights.

    Args:
        attention: name of transformers' code for it; None: its own choice, or the plain one where that would leave the cap of
            the scores out, as PyTorch's fused attention does.
    Raises:
        ModelError: transformers can't build it, or the weights aren't exactly the model's.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if device == "meta":
            with torch.device("meta"):
                return FallbackModel(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention or ("eager" if capped else None),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        if is_transient(error):
            raise
        raise ModelError(f"{folder}: transformers can't open it: {error}") from error
    if problems := {key: sorted(map(str, names)) for key, names in info.items() if names}:
        raise ModelError(f"{folder}: its weights are not those of the model: {problems}")
    return FallbackModel(model.eval())


def vocabulary_weights(folder: Path, reader: CheckpointReader) -> tuple[DecoderSpec, dict[str, str]]:
    """The model's numbers; and stored name -> "embed", "head" or "bias" of each tensor that has a row for each id.

    Raises:
        ModelError: a tensor has as many rows as there are ids, and transformers says neither that it embeds them nor that it
            gives their logits.
    """
    fallback = load_fallback(folder, device="meta")
    model, spec = fallback.model, fallback.spec
    modules = {id(module): name for name, module in model.named_modules()}
    embed, head = (modules.get(id(part)) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    known = {f"{embed}.weight": "embed", f"{head}.weight": "embed" if spec.tied else "head", f"{head}.bias": "bias"}
    found: dict[str, str] = {}
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if spec.vocab_size not in parameter.shape:
            continue
        if name not in known or parameter.shape[0] != spec.vocab_size:
            raise ModelError(
                f"{folder}: {name} {list(parameter.shape)} may have a row for each id; no tokens can be added to it"
            )
        stored = next((given for given in (name, name.removeprefix(prefix)) if given in reader.names()), None)
        if stored is not None:  # a tied head is stored with the embedding
            found[stored] = known[name]
    return spec, found


def size_of(config: Any) -> DecoderSpec:
    """Numbers of a transformers config, as far as they say how large a decoder is; for counting operations and limits.

    Raises:
        ModelError: it isn't one of attention layers.
    """
    if missing := [key for key in ("hidden_size", "num_attention_heads", "num_hidden_layers") if not hasattr(config, key)]:
        raise ModelError(f"config.json: {config.model_type} has no {missing[0]}; a decoder of attention layers is needed")
    hidden_size, num_heads = int(config.hidden_size), int(config.num_attention_heads)
    return DecoderSpec(
        family=FAMILY,
        vocab_size=int(config.vocab_size),
        hidden_size=hidden_size,
        intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * hidden_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden_size // num_heads),
        max_positions=int(getattr(config, "max_position_embeddings", None) or 2048),
        rope=Rope(10000.0),
        norm_eps=1e-6,
        tied=bool(config.tie_word_embeddings),
    )


def packing_problem(folder: Path) -> str:
    """Why several documents in a row can't be tried at all; empty where they can."""
    config = read_json(folder / "config.json")
    found = sorted(key for key in _MEMORY_KEYS if config.get(key))
    found += ["layer_types"] if set(config.get("layer_types") or []) - {"full_attention"} else []
    if found:
        return f"config.json has {', '.join(found)}: tokens are mixed by more than a mask"
    return "" if load_fallback(folder, device="meta").takes_positions else "the model takes no positions"


def write_fallback_folder(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    source_folder: Path,
    *,
    dtype: torch.dtype | None = None,
    chat: ChatEncoder | None = None,
) -> None:
    """Write trained weights as transformers does, with its config and tokenizer.

    Args:
        out: an existing folder, empty of model files.
        tensors: name of each parameter -> whole tensor.
        dtype: of all tensors; None: the source's.
        chat: see `write_hf_folder`.
    Raises:
        ModelError: a number is too great for the dtype.
    """
    reader = CheckpointReader(source_folder)
    stored = dtype or reader.dtype(reader.names()[0])
    model = load_fallback(source_folder, dtype=stored).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(to_store(name, tensors[name], stored))
    with tempfile.TemporaryDirectory(dir=out.parent) as saved:
        model.save_pretrained(saved)
        for path in Path(saved).glob("*.safetensors*"):
            shutil.move(path, out / path.name)
    for name in COPIED_FILES:
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, out / name)
    if chat is not None:
        chat.rules.save(out)
    ends = generation_ends(source_folder, chat)
    config = read_json(source_folder / "config.json")
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", config | ends)
    if (source_folder / "generation_config.json").is_file():
        write_json(out / "generation_config.json", read_json(source_folder / "generation_config.json") | ends)


def lost_in_round_trip(folder: Path, out: Path) -> list[str]:
    """Load a folder's weights, write them to `out`, an existing empty folder; see `different_tensors`."""
    write_fallback_folder(out, dict(load_fallback(folder).model.named_parameters()), folder)
    return different_tensors(folder, out)


def different_tensors(left: Path, right: Path) -> list[str]:
    """Names of the tensors that two folders don't both hold with the same dtype and bits."""
    before, after = CheckpointReader(left), CheckpointReader(right)
    different = set(before.names()) ^ set(after.names())
    for name in set(before.names()) & set(after.names()):
        one, other = before.get(name), after.get(name)
        if one.dtype != other.dtype or not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            different.add(name)
    return sorted(different)


@torch.no_grad()
def compare_documents(model: FallbackModel, documents: list[torch.Tensor], *, packed: bool) -> tuple[float, int]:
    """(greatest difference of a logit to the document alone, relative to the greatest |logit|; logits that changed in any bit
    when all tokens of every second document, and the padding, were changed).

    Args:
        packed: all documents in one row; else each in a row of its own, all rows in one batch.
    """
    alone = [model.model(input_ids=ids[None], use_cache=False).logits[0] for ids in documents]
    together = _together(model, documents, 0, packed=packed)
    changed = [(ids + 1) % model.spec.vocab_size if number % 2 else ids for number, ids in enumerate(documents)]
    again = _together(model, changed, 1, packed=packed)
    largest = max(float(logits.abs().max()) for logits in alone)
    difference = max(float((a - b).abs().max()) for a, b in zip(together, alone))
    leaked = sum(int((a != b).sum()) for a, b in list(zip(together, again))[::2])
    return (difference / largest if math.isfinite(difference) else math.inf), leaked


@torch.no_grad()
def difference_to_plain(model: FallbackModel, folder: Path, documents: list[torch.Tensor]) -> float:
    """Greatest difference of a logit of a document alone to that by the attention which transformers writes out step by step,
    relative to the greatest |logit|: faster code may leave out what the config asks for."""
    reference = load_fallback(folder, attention="eager").model
    expected = [reference(input_ids=ids[None], use_cache=False).logits for ids in documents]
    found = [model.model(input_ids=ids[None], use_cache=False).logits for ids in documents]
    differences = torch.stack([(one - other).abs().max() for one, other in zip(found, expected)])
    return float(differences.max() / torch.stack([logits.abs().max() for logits in expected]).max())


def _together(model: FallbackModel, documents: list[torch.Tensor], pad_id: int, *, packed: bool) -> list[torch.Tensor]:
    lengths = [len(ids) for ids in documents]
    width = (sum(lengths) if packed else max(lengths)) + 3
    shape = (1 if packed else len(documents), width)
    token_ids, positions = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    document_ids = torch.full(shape, -1)
    starts = [sum(lengths[:number]) if packed else 0 for number in range(len(documents))]
    places = [(0 if packed else number, slice(start, start + lengths[number])) for number, start in enumerate(starts)]
    for number, place in enumerate(places):
        token_ids[place], positions[place] = documents[number], torch.arange(lengths[number])
        document_ids[place] = number
    logits = model(token_ids, positions, DocumentLayout.from_document_ids(document_ids))
    return [logits[place] for place in places]
