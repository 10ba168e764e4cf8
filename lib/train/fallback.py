"""The loss of a model that transformers computes: the logits of a whole batch at once, so it takes more memory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lib.config.model import LoraConfig
from lib.core.errors import ConfigError
from lib.core.examples import IGNORE_INDEX
from lib.models.hf_fallback import FallbackModel, load_fallback
from lib.models.layers.documents import DocumentLayout
from lib.parallel.load import reshard, whole


class FallbackLossModule(nn.Module):
    """A transformers model and its loss; takes and gives what `LossModule` does."""

    def __init__(self, decoder: FallbackModel) -> None:
        super().__init__()
        self.decoder = decoder

    @staticmethod
    def load(folder: Path, device: torch.device) -> "FallbackLossModule":
        """With a folder's weights in float32, whole on every rank until it is sharded."""
        return FallbackLossModule(load_fallback(folder)).to(device)

    def forward(
        self,
        token_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        layout: DocumentLayout,
        weights_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the weighted loss, number of targets with the greatest logit) over the labels that aren't IGNORE_INDEX."""
        logits_BTV = self.decoder(token_ids_BT, positions_BT, layout)
        kept_BT = labels_BT != IGNORE_INDEX
        logits_NV, labels_N = logits_BTV[kept_BT].float(), labels_BT[kept_BT]
        nll_N = cross_entropy(logits_NV, labels_N, reduction="none")
        total = (nll_N if weights_BT is None else nll_N * weights_BT[kept_BT]).sum()
        return total, (logits_NV.argmax(-1) == labels_N).sum()


def num_fallback_parameters(folder: Path, lora: LoraConfig | None) -> int:
    """Of the folder's model, all of which are trained.

    Raises:
        ConfigError: adapters are asked for; they lie in the layers of the families.
    """
    if lora is not None:
        raise ConfigError("config.model.lora is set, but the model is of no family here; leave it out to train all weights")
    return sum(parameter.numel() for parameter in load_fallback(folder, device="meta").parameters())


def fallback_tensors(module: FallbackLossModule) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, whole float32 tensor) of each parameter, one at a time; every rank must iterate to the end."""
    reshard(module)
    for name, parameter in module.decoder.model.named_parameters():
        yield name, whole(parameter)
