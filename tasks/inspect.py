"""`python -m tasks.inspect encode | pack | show`: what exactly is trained, row by row and token by token."""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lib.core.errors import ConfigError, PostflyteError
from lib.data import inspection
from lib.data.examples import kind_held, open_mixture
from lib.data.feed import ChatFeed
from lib.data.schemas.arrow import TYPE_OF
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from tasks.inspect_flags import Settings, parser, refuse_overwriting, settings_of
from tasks.progress import Bar, bar


def main(arguments: list[str] | None = None) -> int:
    """0 when the file was written or the rows were shown; 1 with one message where something is wrong."""
    flags = parser().parse_args(arguments)
    try:
        settings = settings_of(flags)
        target = flags.html if flags.command == "show" else flags.out
        if target is not None:
            refuse_overwriting(target, settings.data)
        encoder = ChatEncoder.of(Tokenizer.load(Path(settings.model)), settings.config)
        _run(flags, settings, encoder, target)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (PostflyteError, OSError) as error:
        sys.stderr.write(f"inspect: {inspection.printable(str(error))}\n")
        return 1
    return 0


def _run(flags: argparse.Namespace, settings: Settings, encoder: ChatEncoder, target: Path | None) -> None:
    if flags.command == "pack":
        if settings.sequence_length is None:
            raise ConfigError("--sequence-length is missing, and no --config names one")
        feed = ChatFeed(settings.config, settings.data, settings.model, settings.sequence_length, settings.rows_per_step)
        _write_lines(islice(inspection.packed_rows(feed, encoder), flags.rows or 16), flags.out)
        return
    kind = flags.kind or (kind_held(settings.data) if settings.data else None) or "conversation"
    sources = open_mixture(settings.config, settings.data, TYPE_OF[kind], kind=kind)
    rows = islice(inspection.encoded_rows(sources, encoder), flags.rows or (3 if flags.command == "show" else None))
    if flags.command == "encode":
        _write_lines((inspection.row_values(row, encoder.tokenizer) for row in rows), flags.out)
    elif target is not None:
        _write(target, [inspection.preview_page(rows, encoder)])
    else:
        _show(rows, encoder.tokenizer)


def _write_lines(rows: Iterable[dict[str, Any]], target: Path) -> None:
    with bar("inspect", "rows") as shown:
        _write(target, _lines(rows, shown))


def _lines(rows: Iterable[dict[str, Any]], shown: Bar) -> Iterator[str]:
    for row in rows:
        yield f"{json.dumps(row)}\n"
        shown.add(1)


def _write(target: Path, texts: Iterable[str]) -> None:
    """The whole file or none."""
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with staged.open("w", encoding="utf-8") as stream:
            stream.writelines(texts)
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def _show(rows: Iterable[inspection.InspectedRow], tokenizer: Tokenizer) -> None:
    """In colours where there are any, else with trained text between marks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    colours = console.color_system is not None and not console.no_color
    for row in rows:
        text = Text(f"{inspection.heading(row)}\n", style="bold")
        for part, trained in inspection.trained_text(row, tokenizer):
            text.append(f"⟦{part}⟧" if trained and not colours else part, style="black on green" if trained else "not bold dim")
        console.print(text)


if __name__ == "__main__":
    sys.exit(main())
