"""Every way to a loss is the cross-entropy of the logits that the model puts out, whatever its head is made of."""

from typing import Any

import pytest
import torch

from lib.config.heads import HeadsConfig
from lib.core.examples import IGNORE_INDEX, Encoded
from lib.evals.loss import row_losses
from lib.losses.outputs import HeadTargets
from lib.models.decoder import Decoder
from lib.models.heads import HeadedDecoder
from lib.models.layers.documents import DocumentLayout
from lib.models.lora import is_factor
from lib.train.heads import HeadsLossModule
from lib.train.step import LossModule
from tests.lib.models.adapters import with_adapters
from tests.lib.models.batches import logits, packed
from tests.lib.models.checkpoints import family_model

NUM_IDS = 390
"""58 rows of 448 have no id."""
CASES: dict[str, dict[str, Any]] = {
    "tied, capped logits": {"family": "gemma3_text", "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "head of its own": {"family": "llama", "tie_word_embeddings": False},
    "bias, tied": {"family": "qwen2"},
}
ROWS = [[9, 1, 17, 5], [23, 9]]
HEADS = HeadsConfig.parse({"heads": [{"name": "text", "kind": "lm"}, {"name": "reward", "kind": "scalar"}]}, where="test")
Batch = tuple[torch.Tensor, torch.Tensor, DocumentLayout, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module", params=CASES)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """With adapters on all that can have one; the rows without an id hold large numbers, which a loss would show."""
    folder = tmp_path_factory.mktemp("model")
    small: dict[str, Any] = {"hidden_size": 32, "head_dim": 16, "vocab_size": NUM_IDS, "dtype": "float32"}
    found = with_adapters(family_model(folder, **(small | CASES[request.param])), train_fully=("norms",))
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.shape[0] == found.spec.num_rows:
                parameter[NUM_IDS:] = 3.0
    assert found.spec.num_rows == 448 and any(is_factor(name) for name, _ in found.named_parameters())
    return found


def batch() -> Batch:
    """Token ids, positions, documents, labels and their weights; two thirds of the tokens are trained."""
    token_ids, positions, layout = packed(ROWS, 34, NUM_IDS)
    chance = torch.rand(token_ids.shape, generator=torch.Generator().manual_seed(3))
    trained = (layout.document_ids_BT >= 0) & (chance > 0.33)
    return token_ids, positions, layout, torch.where(trained, token_ids.roll(-1, 1), IGNORE_INDEX), chance


def expected(decoder: Decoder, *, weighted: bool) -> tuple[float, int]:
    """(sum of the loss, number of labels with the greatest logit) in float64, from the logits."""
    token_ids, positions, layout, labels, weights = batch()
    with torch.no_grad():
        kept = labels != IGNORE_INDEX
        logits_NV = logits(decoder, token_ids, positions, layout)[kept].double()
        assert logits_NV.shape[1] == NUM_IDS
        nll_N = -logits_NV.log_softmax(-1).gather(-1, labels[kept][:, None])[:, 0]
        factors_N = weights[kept] if weighted else 1.0
        return float((nll_N * factors_N).sum()), int((logits_NV.argmax(-1) == labels[kept]).sum())


def assert_no_gradient_without_an_id(decoder: Decoder) -> None:
    gradients = {name: value.grad for name, value in decoder.named_parameters() if value.shape[0] == 448}
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    assert found and all(gradient[:NUM_IDS].any() and not gradient[NUM_IDS:].any() for gradient in found.values())


@pytest.mark.parametrize("weighted", [False, True])
def test_training_on_the_next_token(decoder: Decoder, weighted: bool) -> None:
    """[C6, D6] Adapters of the head, its cap, and rows without an id, whose gradient is exactly zero."""
    token_ids, positions, layout, labels, weights = batch()
    decoder.zero_grad()
    module = LossModule(decoder, 7)
    total, num_correct = module(token_ids, positions, labels, layout, weights if weighted else None)
    loss, correct = expected(decoder, weighted=weighted)
    assert float(total.detach()) == pytest.approx(loss, rel=1e-5) and int(num_correct) == correct
    total.backward()
    assert_no_gradient_without_an_id(decoder)


def test_training_beside_other_heads(decoder: Decoder) -> None:
    """[C6, D6] The same of a head of kind lm, its weights inside."""
    token_ids, positions, layout, labels, weights = batch()
    decoder.zero_grad()
    headed = HeadedDecoder(decoder.spec, HEADS)
    headed.decoder = decoder
    nothing = HeadTargets(torch.full((len(layout.spans),), torch.nan), torch.zeros(len(layout.spans)))
    found = HeadsLossModule(headed, 7)(token_ids, positions, layout, {"text": HeadTargets(labels, weights), "reward": nothing})
    loss, correct = expected(decoder, weighted=True)
    assert float(found["text"].detach()) == pytest.approx(loss, rel=1e-5) and int(found["correct/text"]) == correct
    found["text"].backward()
    assert_no_gradient_without_an_id(decoder)


def test_held_out_loss(decoder: Decoder) -> None:
    """[B7, D6] Each document a row of its own, all its tokens targets."""
    token_ids, positions, layout, _, _ = batch()
    with torch.no_grad():
        logprobs_BTV = logits(decoder, token_ids, positions, layout).double().log_softmax(-1)
    rows, sums = [], []
    spans = [span for span in layout.spans if span.length > 1]
    for number, span in enumerate(spans):
        ids = token_ids[span.row, span.start : span.end]
        rows.append(Encoded(f"row-{number}", ids.tolist(), [True] * span.length))
        before = logprobs_BTV[span.row, span.start : span.end - 1]
        sums.append(-float(before.gather(-1, ids[1:, None]).sum()))
    found = row_losses(decoder, rows, tokens_per_pack=30, pad_id=0)
    assert [count for _, count in found] == [span.length - 1 for span in spans]
    assert [loss for loss, _ in found] == pytest.approx(sums, rel=1e-5)
