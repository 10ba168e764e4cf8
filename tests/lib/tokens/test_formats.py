"""Laws of every chat format."""

import pytest

from tests.lib.tokens.formats import Format, formats

NAMES = ("chatml", "qwen3", "gemma3", "llama3", "harmony", "table")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    return {form.name: form for form in formats(tmp_path_factory.mktemp("formats"))}


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_mask_equal_an_independent_oracle(every: dict[str, Format], name: str) -> None:
    """[A1][A3][A4][A5] 30 random conversations of each format, with tools and thinking where it has them; a campaign of
    thousands is `python -m tests.masks`."""
    form = every[name]
    rows = [form.conversation(number) for number in range(30)]
    for row, encoded in zip(rows, form.encoder.encode(rows), strict=True):
        assert (encoded.token_ids, encoded.loss_mask) == form.oracle(row), row
