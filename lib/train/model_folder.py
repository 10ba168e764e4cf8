"""A model between its folder and the ranks that train it: read sharded, written back whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from lib.config.heads import HeadsConfig
from lib.config.model import LoraConfig, ModelConfig
from lib.config.train import TrainConfig
from lib.core.errors import InfraError
from lib.models.decoder import Decoder
from lib.models.fallback_lora import write_fallback_adapter
from lib.models.head_io import write_headed_folder
from lib.models.heads import HeadedDecoder
from lib.models.hf_export import write_hf_folder
from lib.models.hf_fallback import is_fallback, write_fallback_folder
from lib.models.hf_io import CheckpointReader, read_spec
from lib.models.lora import put_adapters
from lib.models.peft_export import why_not_peft, write_adapter
from lib.models.weights import WeightMap
from lib.parallel.apply import shard_model
from lib.parallel.load import decoder_of, full_heads, full_tensors, load_heads, load_sharded, trained_tensors
from lib.parallel.tensor import vocabulary_part
from lib.tokens.chat import ChatEncoder
from lib.train.fallback import FallbackLossModule, fallback_factors, fallback_tensors
from lib.train.heads import HeadsLossModule
from lib.train.step import LossModule

WEIGHTS, ADAPTER = "hf", "adapter"


def load_module(
    config: ModelConfig, mesh: DeviceMesh, model_dir: Path, device: torch.device, *, seed: int, fresh: bool
) -> LossModule | FallbackLossModule:
    """The model on this rank. What a checkpoint doesn't hold is read from the model folder; unless `fresh`, the rest is still
    to be filled from one.

    Args:
        seed: of new adapters.
    """
    if is_fallback(model_dir):
        fallback = FallbackLossModule.load(model_dir, device, config.lora, seed=seed)
        shard_model(fallback, mesh, config)
        return fallback
    with torch.device("meta"):
        module = LossModule(Decoder(read_spec(model_dir)[1]), config.loss_chunk_tokens)
    _load(module, config, mesh, model_dir, device, seed=seed, fresh=fresh)
    return module


def load_heads_module(
    config: ModelConfig,
    heads: HeadsConfig,
    mesh: DeviceMesh,
    model_dir: Path,
    device: torch.device,
    *,
    seed: int,
    fresh: bool,
) -> HeadsLossModule:
    """The same with output heads: those of the model folder, and new ones.

    Args:
        seed: of new adapters and heads.
    Raises:
        ModelError: the folder has a head that the run lacks, or has for other outputs.
    """
    with torch.device("meta"):
        module = HeadsLossModule(HeadedDecoder(read_spec(model_dir)[1], heads), config.loss_chunk_tokens)
    _load(module, config, mesh, model_dir, device, seed=seed, fresh=fresh)
    if fresh:
        load_heads(module, model_dir, seed=seed)
    return module


def _load(
    module: LossModule | HeadsLossModule,
    config: ModelConfig,
    mesh: DeviceMesh,
    model_dir: Path,
    device: torch.device,
    *,
    seed: int,
    fresh: bool,
) -> None:
    """Give the decoder in a module its adapters, shard the module, and fill what is not to be filled from a checkpoint."""
    decoder = decoder_of(module)
    if config.lora:
        put_adapters(decoder, config.lora)
        family, _ = read_spec(model_dir)
        _frozen_as_stored(decoder, CheckpointReader(model_dir), family.weight_map(decoder.spec))
    shard_model(module, mesh, config)
    module.vocabulary = vocabulary_part(mesh, decoder.spec.vocab_size)
    if fresh or config.lora:
        load_sharded(module, model_dir, device, adapter_seed=seed)
    else:
        module.to_empty(device=device)


def _frozen_as_stored(decoder: Decoder, reader: CheckpointReader, weights: WeightMap) -> None:
    """Frozen weights take no more memory than on the disk. They are gathered in the compute dtype, so no bit of a result
    depends on it."""
    for name, parameter in decoder.named_parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(reader.dtype(weights.entries[name].names[0]))


def export_dtype(config: TrainConfig) -> torch.dtype | None:
    """Of the weights that a run writes; None: as the model that was trained stores them."""
    return None if config.export_dtype == "model" else getattr(torch, config.export_dtype)


def write_module(
    module: LossModule | FallbackLossModule,
    lora: LoraConfig | None,
    chat: ChatEncoder,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    rank: int,
) -> None:
    """Rank 0 writes folder/hf, the Hugging Face folder that the weights came from with adapters merged into them, and
    folder/adapter where there are adapters that PEFT can hold; the others lend their pieces.

    Args:
        chat: what the model was trained with; its tokenizer's folder is the one that the weights came from.
        dtype: of the weights in folder/hf; None: as the model that was trained stores them.
    Raises:
        InfraError: the disk is full or failed.
        ModelError: a weight is too great for the dtype.
    """
    if isinstance(module, FallbackLossModule):
        _write_fallback(module, lora, chat, folder, dtype=dtype, rank=rank)
        return
    has_adapter = lora is not None and why_not_peft(lora, module.decoder.spec) is None
    if rank:
        for tensors in (full_tensors(module), trained_tensors(module) if has_adapter else ()):
            for _ in tensors:
                continue
        return
    with _fresh(folder):
        write_hf_folder(folder / WEIGHTS, full_tensors(module), chat.tokenizer.folder, dtype=dtype, chat=chat)
        if lora is not None and has_adapter:
            (folder / ADAPTER).mkdir()
            write_adapter(folder / ADAPTER, trained_tensors(module), lora, module.decoder.spec)


def write_heads_module(
    module: HeadsLossModule, chat: ChatEncoder, folder: Path, *, dtype: torch.dtype | None, rank: int
) -> None:
    """As `write_module`, with the heads; there is no folder/adapter, since PEFT knows no heads of ours.

    Raises:
        InfraError: the disk is full or failed.
    """
    heads = full_heads(module)
    if rank:
        for _ in full_tensors(module):
            continue
        return
    with _fresh(folder):
        given = (full_tensors(module), heads, module.headed.config, chat.tokenizer.folder)
        write_headed_folder(folder / WEIGHTS, *given, dtype=dtype, chat=chat)


def _write_fallback(
    module: FallbackLossModule,
    lora: LoraConfig | None,
    chat: ChatEncoder,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    rank: int,
) -> None:
    """Rank 0 holds all of the weights before it writes them."""
    kept = {name: tensor.cpu() for name, tensor in fallback_tensors(module) if rank == 0}
    factors = [(name, tensor.cpu()) for name, tensor in fallback_factors(module) if rank == 0]
    if rank == 0:
        with _fresh(folder):
            write_fallback_folder(folder / WEIGHTS, kept, chat.tokenizer.folder, dtype=dtype, chat=chat)
            if lora is not None:
                (folder / ADAPTER).mkdir()
                write_fallback_adapter(folder / ADAPTER, factors, lora)


@contextmanager
def _fresh(folder: Path) -> Iterator[None]:
    """An empty folder with a place for the weights; a disk that is full or fails is an InfraError."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / WEIGHTS).mkdir(parents=True)
        yield
    except OSError as error:
        raise InfraError(f"{folder}: can't write the trained weights: {error}; free disk space there and run again") from error
