"""The real vLLM with an adapter on its base, in a process of its own."""

from pathlib import Path
from typing import Any

import torch

from lib.cluster.group import Deadlines, Worker, dispatch
from lib.cluster.local import LocalGroup
from lib.config.parallel import ClusterShape
from lib.models.decoder import Decoder
from lib.models.layers.documents import DocumentLayout
from lib.rollout.engine import engine_environment
from lib.train.environment import cpu_environment


class AdapterEngine(Worker):
    """Loads a folder with `enable_lora`, and continues prompts with an adapter."""

    @dispatch()
    def continuations(
        self, folder: str, adapter: str, prompts: list[list[int]], num_tokens: int, max_rank: int
    ) -> list[tuple[list[int], list[float]]]:
        """(greedy tokens, their log-probabilities) of each prompt, in float32."""
        # Here and not above: the process that compares never needs vLLM.
        from vllm import LLM, SamplingParams, TokensPrompt  # noqa: PLC0415
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        settings: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "block_size": 32, "disable_log_stats": True, "seed": 0}
        engine = LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=max(map(len, prompts)) + num_tokens,
            enforce_eager=True,
            logprobs_mode="processed_logprobs",
            enable_lora=True,
            max_lora_rank=max_rank,
            **settings,
        )
        wishes = SamplingParams(temperature=0.0, max_tokens=num_tokens, logprobs=0, detokenize=False, ignore_eos=True)
        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            wishes,
            lora_request=LoRARequest("adapter", 1, adapter),
            use_tqdm=False,
        )
        answers = [output.outputs[0] for output in outputs]
        return [
            (list(answer.token_ids), [table[token].logprob for token, table in zip(answer.token_ids, answer.logprobs)])
            for answer in answers
        ]


@torch.no_grad()
def engine_difference(decoder: Decoder, folder: Path, adapter: Path, *, max_rank: int, num_tokens: int = 12) -> float:
    """Greatest difference of the log-probabilities of what vLLM wrote with the adapter, to a decoder's for the same tokens and
    for its best ones."""
    prompts = [[1, 80 + number, 90, 17 * number % 300 + 3, 5] for number in range(6)]
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)
    env = cpu_environment(1) | engine_environment()
    with LocalGroup(AdapterEngine, shape, env=env, deadlines=Deadlines(), process_group=False) as group:
        arguments = (str(folder), str(adapter), prompts, num_tokens, max_rank)
        answers = group.call("continuations", *arguments, deadline_seconds=600.0)
    worst = 0.0
    for prompt, (tokens, logprobs) in zip(prompts, answers):
        ids = torch.tensor([prompt + tokens])
        layout = DocumentLayout.from_document_ids(torch.zeros_like(ids))
        table_TV = decoder.logits(decoder(ids, torch.arange(ids.shape[1])[None], layout))[0].log_softmax(-1)
        table_TV = table_TV[len(prompt) - 1 : -1]
        chosen_T = table_TV.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((chosen_T - torch.tensor(logprobs)).abs().max()), float((table_TV.amax(-1) - chosen_T).max()))
    return worst
