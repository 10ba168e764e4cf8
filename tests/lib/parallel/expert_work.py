"""What the ranks of the expert tests do: a step of each family from scratch, then a few that are saved and gone on from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lib.config.model import LoraConfig, ModelConfig
from lib.config.optim import OptimConfig
from lib.config.parallel import ClusterShape, ParallelConfig
from lib.models.decoder import Decoder
from lib.models.hf_io import CheckpointReader, load_full, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.experts import Experts, Groups
from lib.models.layers.moe import Moe, RouterLoad, balance_experts, load_balancing_loss, router_z_loss
from lib.models.lora import put_adapters
from lib.models.spec import DecoderSpec, Gate, MoeSpec, Rope
from lib.parallel.apply import shard_model
from lib.parallel.experts import deal_experts, loads_of_all_ranks
from lib.parallel.load import full_tensors, load_sharded, whole
from lib.parallel.mesh import build_mesh
from lib.parallel.reduce import all_reduce_sum, clip_grad_norm
from lib.train.checkpoint import CheckpointStore, Retention, load_state, step_name
from lib.train.folder_shelf import FolderShelf
from lib.train.optim import build_optimizer, set_learning_rate
from lib.train.state import ModelAndOptimizer, TrainState
from tests.lib.parallel.work import share, shift_adapters

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "gpt_oss": {},
    "gpt_oss_adapters": {"lora": LoraConfig(rank=4, targets=("q", "experts"), train_fully=("router",))},
}
"""Family and what is trained of it -> fields of ModelConfig."""
Plan = dict[str, int]
JOBS: dict[int, list[tuple[str, Plan, str | None]]] = {
    2: [(name, {"expert": 2}, None) for name in MODELS],
    4: [
        ("qwen3_moe", {"expert": 4}, "2 expert2"),
        ("qwen3_moe", {"expert": 2, "replicate": 2}, None),
        ("gpt_oss", {"expert": 2}, "2 expert2"),
        ("gpt_oss", {"expert": 4}, None),
    ],
    1: [("qwen3_moe", {}, "4 expert2 replicate2"), ("gpt_oss", {}, "4 expert4"), ("gpt_oss_adapters", {}, "2 expert2")],
}
"""Number of ranks -> a model, how they share it, and the key of a run that is gone on from as well; in the order of running."""
NUM_STEPS = 3
Batch = tuple[torch.Tensor, torch.Tensor, DocumentLayout]


class BalancedLoss(nn.Module):
    """The summed loss of guessing each token plus one, and the loads of the routers."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, layout: DocumentLayout
    ) -> tuple[torch.Tensor, list[RouterLoad]]:
        loads: list[RouterLoad] = []
        logits = self.decoder.logits(self.decoder(token_ids, positions, layout, loads)).float()
        targets = (token_ids[..., None] + 1) % logits.shape[-1]
        return -torch.log_softmax(logits, -1).gather(-1, targets)[..., 0][layout.document_ids_BT >= 0].sum(), loads


class Run:
    """A model on the ranks of this group, and its optimizer."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Adapters are those of the folder's name in MODELS, and add nothing yet."""
        shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=dist.get_world_size(), threads_per_rank=1)
        with torch.device("meta"):
            self.module = BalancedLoss(Decoder(read_spec(folder)[1]))
        config = ModelConfig(
            compute_dtype="float32", activation_checkpointing="layer" if "replicate" in plan else "none", **MODELS[folder.name]
        )
        if config.lora:
            put_adapters(self.module.decoder, config.lora)
        shard_model(self.module, build_mesh(shape, ParallelConfig(**plan)), config)
        self.bytes_read = load_sharded(self.module, folder)
        self.optimizer = build_optimizer(self.module, OptimConfig())
        self.batch: Batch = share(dist.get_world_size(), dist.get_rank(), self.module.decoder.spec.vocab_size)
        set_learning_rate(self.optimizer, 1e-3)

    def step(self) -> dict[str, float]:
        """Gradients of the mean loss and of both losses of balance, over the tokens of all ranks."""
        self.optimizer.zero_grad()
        total, own = self.module(*self.batch)
        loads = own if dist.get_world_size() == 1 else loads_of_all_ranks(own, dist.group.WORLD)
        balance, size = load_balancing_loss(loads), router_z_loss(loads)
        (total / int(loads[0].num_tokens) + 0.1 * balance + 0.01 * size).backward()
        for moe, load in zip((part for part in self.module.modules() if isinstance(part, Moe)), loads, strict=True):
            balance_experts(moe, load.tokens_E, rate=0.01)
        loss = all_reduce_sum({"loss": float(total.detach())})["loss"] / int(loads[0].num_tokens)
        return {"loss": loss, "balance": float(balance.detach()), "size": float(size.detach())}

    def state(self) -> TrainState:
        state = TrainState()
        state.register("model", ModelAndOptimizer(self.module, self.optimizer))
        return state

    def wholes(self) -> dict[str, torch.Tensor]:
        """Weights, moments and buffers, put together from all ranks."""
        found = {f"buffer/{name}": buffer.clone() for name, buffer in self.module.named_buffers()}
        for name, parameter in _trained(self.module):
            found[f"weight/{name}"] = whole(parameter).clone()
            for key, value in self.optimizer.state[parameter].items():
                found[f"{key}/{name}"] = whole(value).clone()
        return found


def everything(root: Path) -> dict[str, Any]:
    """The jobs of this number of ranks; root holds a folder of each model. Keys are a name and `key_of`'s."""
    num_ranks, results = dist.get_world_size(), {}
    for name, plan, other in JOBS[num_ranks]:
        key = f"{name} {key_of(num_ranks, plan)}"
        results[key] = train(root / name, root / key, plan)
        if other:
            results[f"{key} from {other}"] = go_on(root / name, root / f"{name} {other}", plan)
    if num_ranks == 2:
        results["one product"] = one_product()
    return results


def key_of(num_ranks: int, plan: Plan) -> str:
    return " ".join([str(num_ranks), *(f"{name}{size}" for name, size in plan.items())])


def train(folder: Path, out: Path, plan: Plan) -> dict[str, Any]:
    """The first gradients (written by rank 0, as is the state after NUM_STEPS steps), a checkpoint, and one more step."""
    run, rank = Run(folder, plan), dist.get_rank()
    out.mkdir(exist_ok=True)
    reader = CheckpointReader(folder)
    result: dict[str, Any] = {"bytes_read": run.bytes_read, "hidden_differ": _hidden_differ(run, folder)}
    result["not_as_stored"] = [
        name for name, tensor in full_tensors(run.module) if not torch.equal(tensor, reader.get(name).float())
    ]
    shift_adapters(run.module.decoder)
    result["first"] = run.step()
    gradients = {name: whole(_gradient(parameter)).clone() for name, parameter in _trained(run.module)}
    result["norm"], result["clipped"] = (clip_grad_norm(run.module.parameters(), limit) for limit in (0.1, 1e9))
    steps = []
    for _ in range(NUM_STEPS):
        run.optimizer.step()
        steps.append(run.step())
        clip_grad_norm(run.module.parameters(), 1.0)
    state = run.wholes()
    store = CheckpointStore(FolderShelf(out), keep=Retention(1), rank=rank, num_ranks=dist.get_world_size())
    store.save_async(NUM_STEPS, run.state(), {"layout": plan, "loss": 0.0})
    store.wait_for_part()
    dist.barrier()
    store.all_parts_written()
    store.wait_until_published()
    dist.barrier()
    store.close()
    if rank == 0:
        save_file(gradients, out / "gradients.safetensors")
        save_file(state, out / "state.safetensors")
    run.optimizer.zero_grad()
    return result | {"steps": steps, "next": run.step()}


def go_on(folder: Path, saved: Path, plan: Plan) -> dict[str, Any]:
    """What of the state is not what was saved, and the next step."""
    run = Run(folder, plan)
    load_state(
        FolderShelf(saved).open(step_name(NUM_STEPS)),
        run.state(),
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        layout=plan,
    )
    before, after = load_file(saved / "state.safetensors"), run.wholes()
    wrong = sorted(before.keys() ^ after.keys()) + [name for name in before if not torch.equal(before[name], after[name])]
    return {"wrong": wrong, "next": run.step()}


def one_product() -> dict[str, float]:
    """Greatest differences of a layer whose experts are computed in one product each, as on GPUs, dealt out over two ranks,
    from the whole layer with the rows of both. Rank 0 has no rows for the last expert, rank 1 none for the first three."""
    rank, moe = dist.get_rank(), MoeSpec((0,), 6, 2, 16, "softmax", bias=True)
    spec = DecoderSpec("llama", 8, 8, 8, 1, 2, 2, 4, 64, Rope(1e4), 1e-6, True, gate=Gate("clamped", 1.7, 1.0), moe=moe)
    sizes = [[3, 0, 4, 1, 5, 0], [0, 0, 0, 2, 9, 1]]
    whole_layer, dealt = Experts(spec, moe), Experts(spec, moe)
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(dealt.parameters(), whole_layer.parameters()):
        theirs.data = torch.randn(theirs.shape, generator=generator)
        ours.data = theirs.data.clone()
    rows = [torch.randn(sum(own), 8, generator=generator) for own in sizes]
    deal_experts(dealt, init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    factors = torch.linspace(-1, 1, 8)

    outputs, inputs = [], [part.requires_grad_() for part in rows]
    for part, own in zip(inputs, sizes):
        outputs.append(whole_layer(part, _in_one(own)))
        (outputs[-1] * factors).sum().backward()
    mine = rows[rank].detach().clone().requires_grad_()
    output = dealt(mine, _in_one(sizes[rank]))
    (output * factors).sum().backward()
    expected = inputs[rank].grad
    assert mine.grad is not None and expected is not None
    return {
        "output": float((output - outputs[rank]).detach().abs().max()),
        "inputs": float((mine.grad - expected).abs().max()),
        "weights": max(
            float((whole(_gradient(ours)) - _gradient(theirs)).abs().max())
            for ours, theirs in zip(dealt.parameters(), whole_layer.parameters())
        ),
    }


def _in_one(sizes: list[int]) -> Groups:
    experts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return Groups(experts, torch.tensor(sizes).cumsum(0).to(torch.int32), [])


@torch.no_grad()
def _hidden_differ(run: Run, folder: Path) -> int:
    """Hidden numbers of this rank's rows that are not, to the bit, those of a whole decoder that sees no other rows."""
    with torch.device("meta"):
        plain = Decoder(read_spec(folder)[1])
    load_full(plain, folder)
    found: list[torch.Tensor] = []
    hook = run.module.decoder.norm.register_forward_hook(lambda _m, _a, output: found.append(output.clone()))
    run.module(*run.batch)
    hook.remove()
    return int((found[0] != plain(*run.batch)).sum())


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
