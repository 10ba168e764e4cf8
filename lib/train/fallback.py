"""The loss of a model that transformers computes: the logits of a whole batch at once, so it takes more memory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lib.config.model import LoraConfig
from lib.core.examples import IGNORE_INDEX
from lib.models.fallback_lora import merged_weight, put_fallback_adapters
from lib.models.hf_fallback import FallbackModel, load_fallback
from lib.models.layers.documents import DocumentLayout
from lib.models.lora import is_factor
from lib.parallel.load import reshard, whole


class FallbackLossModule(nn.Module):
    """A transformers model and its loss; takes and gives what `LossModule` does."""

    def __init__(self, decoder: FallbackModel) -> None:
        super().__init__()
        self.decoder = decoder

    @staticmethod
    def load(folder: Path, device: torch.device, lora: LoraConfig | None = None, *, seed: int = 0) -> "FallbackLossModule":
        """With a folder's weights in float32, whole on every rank until it is sharded; and with new adapters.

        Raises:
            ConfigError: the model can't have them.
        """
        model = load_fallback(folder)
        if lora is not None:
            put_fallback_adapters(model, lora, seed=seed)
        return FallbackLossModule(model).to(device)

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
    """Numbers of the folder's model that are trained.

    Raises:
        ConfigError: the model can't have such adapters.
    """
    model = load_fallback(folder, device="meta")
    if lora is not None:
        put_fallback_adapters(model, lora, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def fallback_tensors(module: FallbackLossModule) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, whole float32 tensor) of each parameter, one at a time, adapters merged into their weights; every
    rank must iterate to the end."""
    reshard(module)
    model = module.decoder.model
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        if is_factor(name):
            continue
        if name.endswith(".weight") and hasattr(layer, "lora"):
            yield name, merged_weight(layer, whole(parameter), whole(layer.lora.a), whole(layer.lora.b))
        else:
            yield name, whole(parameter)


def fallback_factors(module: FallbackLossModule) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of each factor of an adapter; see `fallback_tensors`."""
    reshard(module)
    for name, parameter in module.decoder.model.named_parameters():
        if is_factor(name):
            yield name, whole(parameter)
