"""What an imported model must show before anything is built on it: an exact tokenizer, and text it isn't surprised by."""

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.core.errors import ModelError, TokenizerError

PROBES = (
    "Hello world",
    "  two spaces, a\ttab\nand two lines\n\n",
    "12 + 345 = 357; 1999-12-31, 3.14159",
    "naïve café — “quotes” … 漢字 🙂",
    "<|im_start|>user\nHi<|im_end|>\n",
    "def f(x):\n    return x ** 2  # comment",
)
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
        TokenizerError: AutoTokenizer's ids differ from tokenizer.json's, a probe doesn't come back, or a begin token
            is put before a text (or not) against what the folder declares.
        ModelError: the perplexity is above the bound, as it is when weights are permuted, cut or badly dequantised.
    """
    check_tokenizer(folder)
    perplexity = plain_text_perplexity(folder)
    if not perplexity <= max_perplexity:
        raise ModelError(f"{folder}: perplexity {perplexity:.1f} on plain text is above {max_perplexity}; the import is wrong")
    return perplexity


def check_tokenizer(folder: Path) -> None:
    """Raises TokenizerError; see `check_import`."""
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for text in PROBES:
        expected: list[int] = raw.encode(text, add_special_tokens=False).ids
        found: list[int] = loaded.encode(text, add_special_tokens=False)
        if found != expected:
            raise TokenizerError(f"{folder}: {text!r} is {found} to AutoTokenizer and {expected} to tokenizer.json")
        if raw.decode(expected, skip_special_tokens=False) != text:
            raise TokenizerError(f"{folder}: {text!r} doesn't come back from its tokens; the tokenizer loses text")
        with_specials: list[int] = loaded.encode(text)
        has_bos = with_specials[:1] == [loaded.bos_token_id] and with_specials != expected
        if has_bos != bool(getattr(loaded, "add_bos_token", False)):
            raise TokenizerError(f"{folder}: begin token {'added' if has_bos else 'missing'} against the tokenizer's config")


@torch.inference_mode()
def plain_text_perplexity(folder: Path) -> float:
    """exp(mean negative log-likelihood) of PLAIN_TEXT's tokens after the first."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True)
    token_ids = torch.tensor([tokenizer.encode(PLAIN_TEXT)])
    logits = model(input_ids=token_ids).logits[0, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits, token_ids[0, 1:]).item())
