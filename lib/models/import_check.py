"""What an imported model must show before anything is built on it: an exact tokenizer, and text it isn't surprised by."""

import json
import math
from pathlib import Path

import tokenizers
import torch
from transformers import AutoModelForCausalLM

from lib.core.errors import ModelError, TokenizerError
from lib.tokens.tokenizer import Tokenizer

PLAIN_TEXT = (
    "Water moves around the Earth all the time. The sun warms the sea, and some of the water turns into vapour and rises "
    "into the air. High above the ground the air is cold, so the vapour becomes small drops that form clouds. When the drops "
    "grow heavy, they fall as rain or snow. Rivers carry the water back to the sea, and the cycle begins again. Farmers "
    "need rain for their crops, cities store it in large tanks, and people use it every day to drink, to cook and to wash. "
    "In a dry year there may not be enough, so it is important to use water with care."
)


def check_import(folder: Path, *, max_perplexity: float) -> float:
    """Returns the perplexity on PLAIN_TEXT, measured with transformers in float32.

    Raises:
        TokenizerError: what `Tokenizer.load` refuses, or a begin token against what the folder declares.
        ModelError: the perplexity is above the bound, as it is when weights are permuted, cut or badly dequantised.
    """
    tokenizer = Tokenizer.load(folder)
    check_begin_token(folder)
    perplexity = plain_text_perplexity(folder, tokenizer)
    if not perplexity <= max_perplexity:
        raise ModelError(f"{folder}: perplexity {perplexity:.1f} on plain text is above {max_perplexity}; the import is wrong")
    return perplexity


def check_begin_token(folder: Path) -> None:
    """Raises TokenizerError when tokenizer.json puts a begin token before a text against its config, or the reverse."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    token = config.get("bos_token")
    name = token["content"] if isinstance(token, dict) else token
    found = raw.encode("text").ids[:1] == [raw.token_to_id(name)] if name else False
    if found != bool(config.get("add_bos_token", False)):
        raise TokenizerError(
            f"{folder}: tokenizer.json {'adds' if found else 'lacks'} a begin token against tokenizer_config.json"
        )


@torch.inference_mode()
def plain_text_perplexity(folder: Path, tokenizer: Tokenizer) -> float:
    """exp(mean negative log-likelihood) of PLAIN_TEXT's tokens after the first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True)
    token_ids = torch.tensor([tokenizer.encode(PLAIN_TEXT)])
    logits = model(input_ids=token_ids).logits[0, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits, token_ids[0, 1:]).item())
