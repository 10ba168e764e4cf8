"""Laws of training several outputs: each head's sum is divided once by its own count; micro-batches change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.config.heads import HeadsConfig
from lib.core.examples import IGNORE_INDEX
from lib.losses.outputs import HeadTargets
from lib.models.flops import FlopCounter
from lib.models.heads import HeadedDecoder
from lib.models.hf_io import read_spec
from lib.models.layers.documents import DocumentLayout
from lib.parallel.load import load_heads, load_sharded
from lib.train.heads import HeadsLossModule, HeadsObjective
from lib.train.step import accumulate_gradients, count_step
from tests.lib.models.batches import heads_micro_batch, packed
from tests.tiny import VOCAB_SIZE, tiny_model

LENGTHS = [[5, 9, 3], [12, 1], [4, 4, 8]]
HEADS = HeadsConfig.parse(
    {
        "heads": [
            {"name": "text", "kind": "lm", "weight": 0.5},
            {"name": "reward", "kind": "scalar", "weight": 2.0},
            {"name": "clicked", "kind": "scalar", "loss": "logistic", "weight": 0.3},
            {"name": "topic", "kind": "classification", "labels": ["a", "b", "c"]},
            {"name": "worth", "kind": "scalar", "per": "token", "weight": 0.7},
        ]
    },
    where="test",
)
Rows = tuple[torch.Tensor, torch.Tensor, DocumentLayout, dict[str, HeadTargets]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), dtype="float32")


def module_of(folder: Path) -> HeadsLossModule:
    with torch.device("meta"):
        module = HeadsLossModule(HeadedDecoder(read_spec(folder)[1], HEADS), 4)
    load_sharded(module, folder)
    load_heads(module, folder, seed=0)
    return module


def batch() -> Rows:
    """Three rows of eight documents; every second document has no reward, one has no topic, tokens have a worth."""
    token_ids, positions, layout = packed(LENGTHS, 20, VOCAB_SIZE)
    generator = torch.Generator().manual_seed(1)
    documents, tokens = layout.document_ids_BT >= 0, torch.rand(3, 20, generator=generator)
    labels = torch.where(documents & (tokens > 0.3), token_ids.roll(-1, 1), IGNORE_INDEX)
    every_second = torch.arange(8) % 2 * torch.rand(8, generator=generator)
    topics = torch.tensor([0, 1, 2, IGNORE_INDEX, 1, 1, 0, 2])
    return (
        token_ids,
        positions,
        layout,
        {
            "text": HeadTargets(labels, torch.where(labels == IGNORE_INDEX, 0.0, tokens)),
            "reward": HeadTargets(torch.where(every_second > 0, 1.5, float("nan")).expand(8), every_second),
            "clicked": HeadTargets((torch.arange(8) % 3 == 0).float(), torch.ones(8)),
            "topic": HeadTargets(topics, torch.ones(8)),
            "worth": HeadTargets(torch.where(documents, tokens, float("nan")), documents.float()),
        },
    )


def rows_of(whole: Rows, chosen: slice) -> Rows:
    """Some rows of a batch, with the targets of their documents."""
    token_ids, positions, layout, targets = whole
    rows = range(3)[chosen]
    kept = torch.tensor([span.row in rows for span in layout.spans])
    part = {
        name: HeadTargets(*((value[chosen] if value.dim() == 2 else value[kept]) for value in (target.values, target.factors)))
        for name, target in targets.items()
    }
    return token_ids[chosen], positions[chosen], DocumentLayout.from_document_ids(layout.document_ids_BT[chosen]), part


def gradients(module: HeadsLossModule, micro_batches: list[Rows]) -> tuple[float, dict[str, Any]]:
    module.zero_grad()
    micro, objective = [heads_micro_batch(*rows) for rows in micro_batches], HeadsObjective(HEADS)
    counts = count_step(micro, objective, FlopCounter(module.headed.decoder.spec), part_written=False)
    sums = accumulate_gradients(module, micro, objective, divisors=counts.divisors, device=torch.device("cpu"))
    loss = objective.loss(sums, counts.divisors)
    return loss, {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_the_loss_is_the_weighted_sum_of_the_means_and_micro_batches_change_nothing(folder: Path) -> None:
    """[C1] [C2] Against each head written out with the plain functions of torch over logits and outputs; then 1 + 2 rows, the
    first without any topic: the same loss and gradients, though targets are spread unevenly."""
    module, whole = module_of(folder), batch()
    token_ids, positions, layout, targets = whole
    with torch.no_grad():
        hidden = module.headed.decoder(token_ids, positions, layout)
        outputs = module.headed.outputs(hidden, layout)
        text, clicked = targets["text"], targets["clicked"]
        kept = text.factors > 0
        log_probs = module.headed.decoder.logits(hidden)[kept].log_softmax(-1)
        text_mean = -(text.factors[kept] * log_probs.gather(-1, text.values[kept][:, None])[:, 0]).sum() / text.factors.sum()
        odd = targets["reward"].factors
        reward_mean = (odd * (outputs["reward"] - 1.5).square()).sum() / odd.sum()
        clicked_mean = torch.nn.functional.binary_cross_entropy(outputs["clicked"].sigmoid(), clicked.values)
        topic_mean = torch.nn.functional.cross_entropy(outputs["topic"], targets["topic"].values, ignore_index=IGNORE_INDEX)
        here = targets["worth"].factors > 0
        worth_mean = (outputs["worth"] - targets["worth"].values)[here].square().mean()
        expected = 0.5 * text_mean + 2.0 * reward_mean + 0.3 * clicked_mean + topic_mean + 0.7 * worth_mean
    loss, whole_gradients = gradients(module, [whole])
    assert loss == pytest.approx(float(expected), rel=1e-5)
    targets["topic"].values[:3] = IGNORE_INDEX
    loss, whole_gradients = gradients(module, [whole])
    again, part_gradients = gradients(module, [rows_of(whole, slice(0, 1)), rows_of(whole, slice(1, 3))])
    assert again == pytest.approx(loss, rel=1e-6)
    assert whole_gradients.keys() == part_gradients.keys() == {name for name, _ in module.named_parameters()}
    for name, gradient in whole_gradients.items():
        assert (part_gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=0.05), name


def test_figures_are_shares_of_each_heads_own_targets() -> None:
    """[C10] Tokens by their number, whatever their weights: 30 of 40, whose weights sum to 20. Documents by theirs: 3 of 5 and
    none of 4. Losses over the sum of the weights; a head without targets has 0, not a NaN."""
    sums = {"text": 60.0, "correct/text": 30.0, "reward": 8.0, "clicked": 10.0, "correct/clicked": 3.0}
    sums |= {"topic": 6.0, "correct/topic": 0.0, "worth": 0.0}
    divisors = {"text": 20.0, "reward": 16.0, "clicked": 5.0, "topic": 4.0, "worth": 0.0}
    found = HeadsObjective(HEADS).figures(sums, divisors, num_targets=40)
    assert {name: found[f"loss/{name}"] for name in divisors} == {
        "text": 3.0, "reward": 0.5, "clicked": 2.0, "topic": 1.5, "worth": 0.0,
    }  # fmt: skip
    assert {name: found[f"targets/{name}"] for name in divisors} == divisors
    accuracies = {name: value for name, value in found.items() if name.startswith("accuracy/")}
    assert accuracies == {"accuracy/text": 0.75, "accuracy/clicked": 0.6, "accuracy/topic": 0.0}


def test_targets_must_be_those_of_the_heads(folder: Path) -> None:
    token_ids, positions, layout, targets = batch()
    with pytest.raises(ValueError, match=r"targets are for \['text'\]"):
        module_of(folder)(token_ids, positions, layout, {"text": targets["text"]})
