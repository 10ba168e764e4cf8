"""Checkpoints whose experts are stored in MXFP4, as gpt-oss is published: decoded into bfloat16, which holds each number.

A weight W [E, out, in] lies in two tensors of bytes: `<name>_blocks` [E, out, in / 32, 16] with two numbers a byte, the lower
half first, and `<name>_scales` [E, out, in / 32], exponents of 2 with a bias of 127. The decoded tensor `<name>` is W
transposed, [E, in, out]. Source of the format: OCP Microscaling Formats (MX) v1.0, sections 5.3 and 5.4.

Letters: E experts, O rows, G groups of 32 numbers in a row, I = 32 G.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lib.core.artifact import link_or_copy
from lib.core.errors import ModelError
from lib.models.hf_export import write_json, write_shards
from lib.models.hf_io import INDEX_FILE, CheckpointReader, read_json

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three bits; the fourth is the sign."""
_BIAS, _NOT_A_NUMBER = 127, 255
_SHARD_BYTES = 4 << 30


def is_mxfp4(folder: Path) -> bool:
    """Whether a model folder's config says that weights are stored so."""
    found = read_json(folder / "config.json").get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "mxfp4"


def decoded_config(folder: Path) -> dict[str, Any]:
    """The config of a model folder; where its weights are stored so, that of the decoded model."""
    config = read_json(folder / "config.json")
    if is_mxfp4(folder):
        del config["quantization_config"]
    return config


def decode_folder(source: Path, target: Path) -> None:
    """Write a model folder into the empty folder `target` with all weights as numbers; other files are linked.

    Raises:
        ModelError: blocks without scales, of shapes that don't fit, or with numbers that are none.
    """
    reader = CheckpointReader(source)
    write_shards(target, _decoded(reader), _SHARD_BYTES)
    write_json(target / "config.json", decoded_config(source))
    left_out = {"config.json", INDEX_FILE, *reader.files()}
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in left_out:
            link_or_copy(path.resolve(), target / path.name)


def dequantize(blocks_EOGB: torch.Tensor, scales_EOG: torch.Tensor) -> torch.Tensor:
    """[E, I, O] bfloat16 of uint8 blocks [E, O, G, 16] and scales [E, O, G].

    Raises:
        ModelError: the shapes don't fit, or a number is none or too large.
    """
    if blocks_EOGB.ndim != 4 or blocks_EOGB.shape[3] != 16 or blocks_EOGB.shape[:3] != scales_EOG.shape:
        raise ModelError(
            f"blocks of shape {tuple(blocks_EOGB.shape)} and scales {tuple(scales_EOG.shape)} don't fit; expected "
            "[experts, rows, groups, 16] and [experts, rows, groups]"
        )
    table = torch.tensor([*VALUES, *(-value for value in VALUES)])
    num_experts, num_rows, num_groups, _ = blocks_EOGB.shape
    decoded = torch.empty(num_experts, num_groups * 32, num_rows, dtype=torch.bfloat16)
    for out_IO, blocks_OGB, scales_OG in zip(decoded, blocks_EOGB, scales_EOG):
        codes_OG32 = torch.stack((blocks_OGB & 15, blocks_OGB >> 4), dim=-1).flatten(-2)
        exponents_OG = scales_OG.int() - _BIAS
        values_OG32 = torch.ldexp(table[codes_OG32.int()].double(), exponents_OG[..., None])
        out_IO.copy_(values_OG32.flatten(1).T)
    if (scales_EOG == _NOT_A_NUMBER).any() or not decoded.isfinite().all():
        raise ModelError("a scale is not a number, or too large for bfloat16; the file is damaged")
    return decoded


def _decoded(reader: CheckpointReader) -> Iterator[tuple[str, torch.Tensor]]:
    names = set(reader.names())
    for name in reader.names():
        base = name.removesuffix(BLOCKS)
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in names:
            continue
        if base == name:
            yield name, reader.get(name)
        elif base + SCALES not in names:
            raise ModelError(f"{reader.folder}: {name} has no {base + SCALES} beside it; copy the whole folder")
        else:
            try:
                yield base, dequantize(reader.get_bytes(name), reader.get_bytes(base + SCALES))
            except ModelError as error:
                raise ModelError(f"{reader.folder}: {base}: {error}") from error
