"""What several tests of streams share."""

import pytest

from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    """Trains on all assistant turns; pad == eos."""
    return ChatEncoder(Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")))
