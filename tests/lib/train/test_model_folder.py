"""What a rank loads to train adapters is small and the same function as in float32; what it writes has the dtype asked for."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lib.config.data import DataConfig
from lib.config.model import LoraConfig, ModelConfig
from lib.config.parallel import ClusterShape
from lib.config.train import TrainConfig
from lib.core.errors import ModelError
from lib.models.decoder import Decoder
from lib.models.hf_io import CheckpointReader, load_full, read_json, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.lora import fill_factors, put_adapters
from lib.parallel.mesh import build_mesh
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from lib.train.model_folder import export_dtype, load_module, write_module
from lib.train.step import LossModule
from tests.lib.models.checkpoints import family_model
from tests.lib.parallel.ranks import run_here
from tests.tiny import VOCAB_SIZE, tiny_model

LORA = LoraConfig(rank=4, targets=("q", "down"), train_fully=("norms",))
SEED = 3


def step(module: LossModule) -> dict[str, Any]:
    """Loss and gradients of one batch, dtypes of what is trained and of what isn't."""
    token_ids = torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))
    positions, layout = torch.arange(16).expand(2, 16), DocumentLayout.from_document_ids(torch.zeros(2, 16))
    loss, _ = module(token_ids, positions, token_ids, layout)
    loss.backward()
    dtypes = {trained: {str(p.dtype) for p in module.parameters() if p.requires_grad == trained} for trained in (True, False)}
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    wholes = [getattr(gradient, "full_tensor", lambda gradient=gradient: gradient)() for gradient in gradients]
    return {
        "loss": float(loss.detach()),
        "gradients": [whole.flatten().tolist() for whole in wholes],
        "trained": sorted(dtypes[True]),
        "frozen": sorted(dtypes[False]),
    }


def loaded(folder: Path) -> dict[str, Any]:
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)
    config = ModelConfig(compute_dtype="float32", lora=LORA, loss_chunk_tokens=8)
    return step(load_module(config, build_mesh(shape), folder, torch.device("cpu"), seed=SEED, fresh=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_frozen_weights_are_kept_as_stored_and_no_bit_depends_on_it(tmp_path: Path, dtype: str) -> None:
    """A folder, computed in float32, against a decoder that is float32 throughout: the same bits."""
    folder = tiny_model(tmp_path, dtype=dtype)
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    put_adapters(decoder, LORA)
    fill_factors(decoder, SEED)
    plain, ours = step(LossModule(decoder, 8)), run_here(loaded, folder)
    assert ours["trained"] == ["torch.float32"] and ours["frozen"] == [f"torch.{dtype}"]
    assert ours["loss"] == plain["loss"] and ours["gradients"] == plain["gradients"]


def dtypes_of_experts(folder: Path) -> dict[str, str]:
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)
    config = ModelConfig(compute_dtype="bfloat16")
    module = load_module(config, build_mesh(shape), folder, torch.device("cpu"), seed=SEED, fresh=True)
    step(module)
    return {name: str(tensor.dtype) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def test_what_balances_experts_is_float32_in_every_compute_dtype(tmp_path: Path) -> None:
    """[C8] [E2] A bias of 1 moves by 0.001 a step: bfloat16 has nothing between 1 and 1.008."""
    found = run_here(dtypes_of_experts, family_model(tmp_path, "qwen3_moe"))
    assert "decoder.layers.0.mlp.expert_bias" in found and set(found.values()) == {"torch.float32"}


TRAINED = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
"""Dtype of the model's weights -> dtype that it is computed in."""
EXPORTED = get_args(TrainConfig.model_fields["export_dtype"].annotation)


def write_each(root: Path) -> None:
    """Load each model and write it in each dtype."""
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)
    for stored, computed in TRAINED.items():
        config = ModelConfig.parse({"compute_dtype": computed}, where="test")
        module = load_module(config, build_mesh(shape), root / stored, torch.device("cpu"), seed=SEED, fresh=True)
        chat = ChatEncoder.of(Tokenizer.load(root / stored), DataConfig())
        for exported in EXPORTED:
            dtype = export_dtype(TrainConfig(export_dtype=exported))
            write_module(module, None, chat, root / f"{stored} as {exported}", dtype=dtype, rank=0)


def test_weights_are_written_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    """[C9] Three dtypes of the model, and for each three that are asked for or none: all files, the config, and the numbers,
    which are the model's rounded once."""
    for stored in TRAINED:
        tiny_model(tmp_path / stored, dtype=stored)
    run_here(write_each, tmp_path)
    for stored in TRAINED:
        source = CheckpointReader(tmp_path / stored)
        for exported in EXPORTED:
            name = stored if exported == "model" else exported
            folder = tmp_path / f"{stored} as {exported}" / "hf"
            written = CheckpointReader(folder)
            assert read_json(folder / "config.json")["dtype"] == name
            assert written.names() == source.names()
            for tensor in written.names():
                assert written.dtype(tensor) == getattr(torch, name), (stored, exported, tensor)
                assert torch.equal(written.get(tensor), source.get(tensor).to(getattr(torch, name))), (stored, exported, tensor)


def test_a_weight_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    """float16 ends at 65,504."""
    folder = tiny_model(tmp_path / "model")
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)

    def write() -> None:
        module = load_module(ModelConfig(), build_mesh(shape), folder, torch.device("cpu"), seed=SEED, fresh=True)
        with torch.no_grad():
            module.get_parameter("decoder.norm.weight")[0] = 70_000.0
        chat = ChatEncoder.of(Tokenizer.load(folder), DataConfig())
        with pytest.raises(ModelError, match=r"norm.weight holds 70000, and float16 ends at 65504; write bfloat16 or float32"):
            write_module(module, None, chat, tmp_path / "out", dtype=torch.float16, rank=0)

    run_here(write)
