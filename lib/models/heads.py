"""Outputs beside the next token: a decoder with named heads on its last hidden states.

Letters: B rows, T tokens, D model, N documents, O outputs of a head.
"""

from dataclasses import replace

import torch
from torch import nn

from lib.config.heads import HeadsConfig
from lib.core.seeding import derive_seed
from lib.models.decoder import Decoder
from lib.models.layers.documents import DocumentLayout
from lib.models.spec import DecoderSpec

SUFFIX = "_head"
"""Of the names of heads as modules."""


class OutputHead(nn.Module):
    """[..., D] -> [..., O], or [...] for a single number."""

    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_outputs, hidden_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        outputs = nn.functional.linear(hidden, self.weight)
        return outputs.squeeze(-1) if self.weight.shape[0] == 1 else outputs


class HeadedDecoder(nn.Module):
    """A decoder and the heads of a configuration; may be built on the meta device."""

    def __init__(self, spec: DecoderSpec, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(headed_spec(spec, config))
        heads = {head.name: OutputHead(spec.hidden_size, head.num_outputs) for head in config.outputs}
        # So that a head may have a name of torch's own, such as "type", or one by which a plan cuts weights, such as "norm".
        self.heads = nn.ModuleDict({f"{name}{SUFFIX}": head for name, head in heads.items()})

    def by_name(self) -> dict[str, OutputHead]:
        """Each head but the language model's."""
        return {name.removesuffix(SUFFIX): head for name, head in self.heads.items() if isinstance(head, OutputHead)}

    def outputs(self, hidden_BTD: torch.Tensor, layout: DocumentLayout) -> dict[str, torch.Tensor]:
        """Output of each head but the language model's, from the decoder's hidden states.

        Returns: by name, [N] or [N, O] in the order of layout.spans for those by document; [B, T] or [B, T, O] for those by
            token, without meaning on padding.
        """
        last_ND = last_tokens(hidden_BTD, layout)
        heads = self.by_name()
        return {head.name: heads[head.name](hidden_BTD if head.by_token else last_ND) for head in self.config.outputs}

    def forward(
        self, token_ids_BT: torch.Tensor, positions_BT: torch.Tensor, layout: DocumentLayout
    ) -> dict[str, torch.Tensor]:
        """See `outputs`; shapes as in `Decoder.forward`."""
        return self.outputs(self.decoder(token_ids_BT, positions_BT, layout), layout)


def headed_spec(spec: DecoderSpec, config: HeadsConfig) -> DecoderSpec:
    """Of the decoder below the heads: without a language model it has no output matrix of the vocabulary."""
    return replace(spec, lm_head=config.lm is not None)


def last_tokens(hidden_BTD: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
    """[N, D] hidden state at the last token of each document, in the order of layout.spans."""
    ends_N = torch.tensor([end - 1 for _, end in layout.flat_ranges()], dtype=torch.int64, device=hidden_BTD.device)
    return hidden_BTD.flatten(0, 1).index_select(0, ends_N)


def initial_weight(name: str, num_outputs: int, hidden_size: int, seed: int) -> torch.Tensor:
    """[O, D] float32 of a new head: normal, so that outputs are of size 1 after the final norm; by name and seed alone."""
    generator = torch.Generator().manual_seed(derive_seed("head", name, seed))
    weight: torch.Tensor = torch.randn(num_outputs, hidden_size, generator=generator) * hidden_size**-0.5
    return weight
