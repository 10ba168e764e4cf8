"""What `python -m tasks.inspect` is asked for: its flags, over a configuration file where one is given."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from lib.config.base import Frozen, read_yaml
from lib.config.data import DataConfig
from lib.config.train import TrainConfig
from lib.core.errors import ConfigError
from lib.data.schemas.layouts import KINDS
from tasks.remote import is_remote
from tasks.sources import RawDataSource

_OWN = ("seed", "num_streams", "train_on")
"""Flags that are settings of `config.data`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(1, f"inspect: {message}; see {self.prog} --help\n")


class Settings(Frozen):
    """What to inspect, checked."""

    config: DataConfig
    data: str
    """Path or address; empty where a mixture names all its sources."""
    model: str
    sequence_length: int | None = Field(ge=8)
    """Tokens in a packed row."""
    rows_per_step: int = Field(ge=1)


def parser() -> argparse.ArgumentParser:
    """Wrong flags end the program with 1 and a message."""
    whole = _Parser(prog="python -m tasks.inspect", description="What exactly is trained, row by row and token by token.")
    commands = whole.add_subparsers(dest="command", required=True)
    for name, about in (
        ("encode", "token ids, loss mask and weights of every row, as JSON lines"),
        ("pack", "the packed rows that a run trains on, in order, as JSON lines"),
        ("show", "rows with their trained tokens coloured, in the terminal or as a page"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--config", type=Path, help="a file of configs/: its config.data, and what flags leave open")
        command.add_argument("--data", help="rows or an ingested data set: a path, or an address of an object store")
        command.add_argument("--model", help="folder with a tokenizer")
        command.add_argument("--rows", type=_positive, help="only so many (pack: 16, show: 3)")
        command.add_argument("--train-on", help="see config.data.train_on")
        if name == "pack":
            command.add_argument("--sequence-length", type=_positive)
            command.add_argument("--seed", type=int)
            command.add_argument("--num-streams", type=_positive)
            command.add_argument("--rows-per-step", type=_positive, help="decides the order where weights have a schedule")
        else:
            command.add_argument("--kind", choices=KINDS, help="of the rows; that of an ingested data set, else conversation")
        command.add_argument("--html" if name == "show" else "--out", type=Path, required=name != "show", help="file to write")
    return whole


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def settings_of(flags: argparse.Namespace) -> Settings:
    """Flags win over the configuration file.

    Raises:
        UserError: a value is wrong or missing, or nothing is there.
    """
    values = read_yaml(flags.config) if flags.config else {}
    where = str(flags.config or "flags")
    sections = _mapping(values, "config", where)
    given = {name: value for name, value in vars(flags).items() if value is not None}
    own = {name: given[name] for name in _OWN if name in given}
    train = TrainConfig.parse(_mapping(sections, "train", where), where=f"{where}: config.train")
    data = given.get("data", values.get("train_data", ""))
    found = {
        "config": DataConfig.parse(_mapping(sections, "data", where) | own, where=f"{where}: config.data"),
        "data": RawDataSource(data).address() if isinstance(data, str) and data else data,
        "model": given.get("model", values.get("model", "")),
        "sequence_length": given.get("sequence_length", values.get("sequence_length")),
        "rows_per_step": given.get("rows_per_step", train.rows_per_step),
    }
    settings = Settings.parse(found, where=where)
    if not settings.model or not (settings.data or settings.config.mixture):
        raise ConfigError(f"{'--data' if settings.model else '--model'} is missing, and no --config names one")
    return settings


def _mapping(values: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    found = values.get(name)
    if not isinstance(found, dict | type(None)):
        raise ConfigError(f"{where}: {name} is {found!r}, expected a mapping of keys to values")
    return found or {}


def refuse_overwriting(target: Path, data: str) -> None:
    """Raises ConfigError: a file there would replace what is read."""
    if target.is_dir():
        raise ConfigError(f"{target}: a folder; name a file to write")
    place = target.resolve()
    if data and not is_remote(data) and Path(data).resolve() in (place, *place.parents):
        raise ConfigError(f"{target}: lies in the data to be read; write somewhere else")
