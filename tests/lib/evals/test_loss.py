"""Laws of the held-out loss."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.core.examples import Encoded
from lib.core.seeding import permutation
from lib.evals.loss import PooledLoss, pooled, row_losses
from lib.models.decoder import Decoder
from lib.models.hf_io import load_full, read_spec
from tests.tiny import VOCAB_SIZE, tiny_model


def _rows(count: int) -> list[Encoded]:
    """Rows of 4 to 33 tokens, about half of them trained."""
    rows = []
    for index in range(count):
        length = 4 + int(permutation(30, "length", index)[0])
        token_ids = [int(number) for number in permutation(VOCAB_SIZE, "tokens", index)[:length]]
        mask = [position % 2 == 1 or position > length // 2 for position in range(length)]
        rows.append(Encoded(f"row-{index}", token_ids, mask))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    with torch.device("meta"):
        model = Decoder(read_spec(folder)[1])
    load_full(model, folder)
    return model


def test_packed_equals_unpacked_equals_transformers(folder: Path, decoder: Decoder) -> None:
    """[B2, B7] Rows by themselves, a few together, all together, and through the reference model one by one."""
    rows = _rows(12)
    alone = row_losses(decoder, rows, tokens_per_pack=1, pad_id=0)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for tokens_per_pack in (40, 100, 10_000):
        packed = row_losses(decoder, rows, tokens_per_pack=tokens_per_pack, pad_id=0)
        for (loss, count), (loss_alone, count_alone) in zip(packed, alone):
            assert count == count_alone
            assert loss / count == pytest.approx(loss_alone / count, rel=1e-6)
    for row, (loss, count) in zip(rows, alone):
        ids = torch.tensor([row.token_ids])
        labels = torch.where(torch.tensor([row.loss_mask]), ids, -100)
        with torch.no_grad():
            expected = reference(ids, labels=labels).loss.item()
        assert loss / count == pytest.approx(expected, rel=1e-5)
        assert count == sum(row.loss_mask[1:])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_counted_apart(tmp_path: Path, poison: float) -> None:
    """[C10] A token whose vector isn't finite: the mean is that of the rows without it, though they share packs; the others
    are counted. Where all rows have it there is no mean."""
    folder = tiny_model(tmp_path, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Decoder(read_spec(folder)[1])
    load_full(model, folder)
    rows, token = _rows(12), _rows(12)[3].token_ids[1]
    losses = row_losses(model, rows, tokens_per_pack=100, pad_id=0)
    clean = [found for row, found in zip(rows, losses) if token not in row.token_ids]
    with torch.no_grad():
        model.get_parameter("embed.weight")[token] = poison
    whole = pooled(row_losses(model, rows, tokens_per_pack=100, pad_id=0))
    assert 0 < len(clean) < len(rows)
    assert (whole.num_rows, whole.num_not_finite) == (len(clean), len(rows) - len(clean))
    assert whole.num_targets == pooled(clean).num_targets
    assert whole.loss == pytest.approx(pooled(clean).loss, rel=1e-6)
    assert pooled(row_losses(model, rows[3:4], tokens_per_pack=100, pad_id=0)) == PooledLoss(None, 0, 0, 1)


def test_every_row_is_reported_once_and_in_order(decoder: Decoder) -> None:
    """Reversed rows give reversed results."""
    rows = _rows(9)
    seen: list[int] = []
    forward = row_losses(decoder, rows, tokens_per_pack=60, pad_id=0, on_rows=seen.append)
    assert sum(seen) == len(rows) == len(forward)
    backward = row_losses(decoder, rows[::-1], tokens_per_pack=60, pad_id=0)
    for (loss, count), (other, other_count) in zip(forward, backward[::-1]):
        assert count == other_count
        assert loss == pytest.approx(other, rel=1e-6)
