"""How many bytes of text each token stands for, for figures in bits per byte."""

import json
import re

import numpy as np

from lib.core.errors import TokenizerError
from lib.tokens.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """[vocab_size] int64: bytes of UTF-8 that each id stands for; 0 for control tokens and for ids that aren't used.

    Counted from the pipeline's own alphabet and never through decoded text, in which a part of a character is one
    replacement character of three bytes. For text that the pipeline doesn't normalise, the sum over its ids is the
    length of its UTF-8.

    Raises:
        TokenizerError: the pipeline's alphabet is neither bytes nor text with bytes to fall back on.
    """
    stages = json.dumps(json.loads(tokenizer.backend.decoder.__getstate__()) if tokenizer.backend.decoder else {})
    by_byte, by_text = '"ByteLevel"' in stages, '"ByteFallback"' in stages
    if not by_byte and not by_text:
        raise TokenizerError(f"{tokenizer.folder}: its tokens are neither byte-level nor have bytes to fall back on")
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    added = tokenizer.backend.get_added_tokens_decoder()
    for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if token in tokenizer.control_tokens:
            continue
        if by_byte:
            # Each character of a token of the model is one byte; added tokens are plain text.
            counts[token_id] = len(token.encode()) if token_id in added else len(token)
        else:
            counts[token_id] = 1 if _BYTE.fullmatch(token) else len(token.replace("\u2581", " ").encode())
    return counts
