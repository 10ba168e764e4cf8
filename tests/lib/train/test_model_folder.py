"""What a rank loads to train adapters: small, and the same function as in float32."""

from pathlib import Path
from typing import Any

import torch

from lib.config.model import LoraConfig, ModelConfig
from lib.config.parallel import ClusterShape
from lib.models.decoder import Decoder
from lib.models.hf_io import load_full, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.lora import fill_factors, put_adapters
from lib.parallel.mesh import build_mesh
from lib.train.model_folder import load_module
from lib.train.step import LossModule
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


def test_frozen_weights_are_kept_as_stored_and_no_bit_depends_on_it(tmp_path: Path) -> None:
    """A bfloat16 folder, computed in float32, against a decoder that is float32 throughout: the same bits."""
    folder = tiny_model(tmp_path)
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    put_adapters(decoder, LORA)
    fill_factors(decoder, SEED)
    plain, ours = step(LossModule(decoder, 8)), run_here(loaded, folder)
    assert ours["trained"] == ["torch.float32"] and ours["frozen"] == ["torch.bfloat16"]
    assert ours["loss"] == plain["loss"] and ours["gradients"] == plain["gradients"]
