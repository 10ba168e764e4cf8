"""Which experts the real vLLM sends tokens to, against our decoder's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.cluster.group import Deadlines, WorkerGroup, dispatch
from lib.cluster.local import LocalGroup
from lib.config.parallel import ClusterShape
from lib.evals.workers import EnginePool, EngineWorker
from lib.models.decoder import Decoder
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.moe import Moe
from lib.rollout.engine import engine_environment
from lib.train.environment import cpu_environment


class RoutingEngine(EngineWorker):
    """An engine of an evaluation whose routers can be watched."""

    @dispatch()
    def routes(self, prompts: list[list[int]], top_k: int) -> list[list[list[list[int]]]]:
        """Of each prompt [tokens][layers][top_k] numbers of experts: the greatest logits of the engine's own routers."""
        # Here and not above: the process that compares never needs vLLM.
        from vllm import SamplingParams, TokensPrompt  # noqa: PLC0415

        engine: Any = self._engine
        seen: list[torch.Tensor] = []
        engine._llm.apply_model(lambda model: _watch_routers(model, seen))
        wishes = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        found = []
        for prompt in prompts:  # one by one, so that the rows that a router sees are the prompt's tokens
            seen.clear()
            engine._llm.generate([TokensPrompt(prompt_token_ids=prompt)], wishes, use_tqdm=False)
            assert all(len(logits) == len(prompt) for logits in seen), "a router saw other tokens than the prompt's"
            found.append(torch.stack([logits.topk(top_k).indices for logits in seen], 1).tolist())
        return found


@contextmanager
def routing_engine(folder: Path, *, max_len: int = 64) -> Iterator[WorkerGroup]:
    """One that has a folder open in float32."""
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)
    env = cpu_environment(1) | engine_environment()
    with LocalGroup(RoutingEngine, shape, env=env, deadlines=Deadlines(), process_group=False) as group:
        EnginePool(group, 600.0).open(folder, "watched", dtype="float32", max_len=max_len, kv_cache_gib=0.0625)
        yield group


def _watch_routers(model: nn.Module, seen: list[torch.Tensor]) -> None:
    for name, part in model.named_modules():
        if name.endswith((".mlp.gate", ".mlp.router")):
            part.register_forward_hook(
                lambda _module, _inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
            )


@torch.no_grad()
def routing_mismatch(decoder: Decoder, group: WorkerGroup) -> dict[str, float]:
    """{"routed": pairs of a token and a layer that both engines routed, "routing_mismatch": share of them whose sets of experts
    differ}. [E6]"""
    prompts = [[(37 * number + 11 * token) % 300 + 3 for token in range(40)] for number in range(6)]
    assert decoder.spec.moe is not None
    answers = group.call("routes", prompts, decoder.spec.moe.top_k, deadline_seconds=600.0)
    num_routed = num_differ = 0
    for prompt, theirs in zip(prompts, answers):
        ours_TLC, theirs_TLC = routes_of(decoder, torch.tensor(prompt)), torch.tensor(theirs)
        assert ours_TLC.shape == theirs_TLC.shape, f"ours {list(ours_TLC.shape)}, theirs {list(theirs_TLC.shape)}"
        differ = (ours_TLC.sort(-1).values != theirs_TLC.sort(-1).values).any(-1)
        num_routed, num_differ = num_routed + differ.numel(), num_differ + int(differ.sum())
    return {"routed": num_routed, "routing_mismatch": num_differ / num_routed}


def routes_of(decoder: Decoder, ids_T: torch.Tensor) -> torch.Tensor:
    """[T, layers, top_k] numbers of the experts of each token, in the layers that have any."""
    found: list[torch.Tensor] = []

    def note(moe: Moe, inputs: tuple[torch.Tensor, DocumentLayout], _output: object) -> None:
        logits_TE = moe.router(inputs[0][0]).float()
        scores_TE = logits_TE if moe.moe.weights == "softmax_of_chosen" else logits_TE.softmax(-1)
        found.append((scores_TE + moe.expert_bias).topk(moe.moe.top_k).indices)

    hooks = [part.register_forward_hook(note) for part in decoder.modules() if isinstance(part, Moe)]
    decoder(ids_T[None], torch.arange(len(ids_T))[None], DocumentLayout.from_document_ids(torch.zeros(1, len(ids_T))))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1)
