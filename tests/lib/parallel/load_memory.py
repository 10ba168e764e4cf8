"""How much memory a rank needs to load its share of a model. Kept apart, so that a rank starts without pytest."""

from pathlib import Path

import torch
import torch.distributed as dist

from lib.config.model import ModelConfig
from lib.config.parallel import ClusterShape, ParallelConfig
from lib.parallel.mesh import build_mesh
from lib.train.model_folder import load_module
from tests.tiny import tiny_model


def folder_of(folder: Path, dtype: str, *, num_layers: int) -> Path:
    """A model of 3.2 million weights a layer and 4.2 million beside them, in several files."""
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": num_layers}
    return tiny_model(folder, dtype=dtype, max_shard_size="25MB", **sizes)


def load(warm: str, folder: str, parallel: dict[str, int]) -> dict[str, int]:
    """Bytes of this rank's share, and by how much the process was larger than before when it was largest, with the pages of
    files that it had mapped. `warm` is loaded before, so that all code is there."""
    sizes, num_ranks = ParallelConfig(**parallel), dist.get_world_size()
    mesh = build_mesh(ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=num_ranks, threads_per_rank=1), sizes)
    config = ModelConfig(compute_dtype="float32")
    load_module(config, mesh, Path(warm), torch.device("cpu"), seed=0, fresh=True)
    dist.barrier()
    forget_peak()
    before = status_bytes("VmHWM")
    module = load_module(config, mesh, Path(folder), torch.device("cpu"), seed=0, fresh=True)
    pieces = [parameter.to_local() for parameter in module.parameters()]
    share = sum(piece.numel() * piece.element_size() for piece in pieces)
    file = max(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {"share": share, "grown": status_bytes("VmHWM") - before, "file": file}


def forget_peak() -> None:
    """The greatest memory so far, VmHWM, becomes the present one."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """Of this process; VmHWM and VmRSS count the pages of files that it has mapped and used."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
