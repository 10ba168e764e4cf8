"""How `pyflyte run` reads an inputs file and shows a mistake, where flytekit's own way loses something.

flytekit takes the last of two equal keys, leaves out an input whose YAML value is `off` or `no`, shows a user's mistake
under pages of traceback, and doesn't say what is wrong with an input that may be left out. There is no hook for any of
these, so three of its functions are wrapped.
"""

from pathlib import Path
from typing import Any

import rich_click as click
from flytekit import FlyteContext
from flytekit.clis.sdk_in_container import utils
from flytekit.clis.sdk_in_container.run import YamlFileReadingCommand
from flytekit.core.type_engine import TypeTransformerFailedError, UnionTransformer
from flytekit.extend import TypeEngine
from flytekit.models.literals import Literal
from flytekit.models.types import LiteralType

from lib.config.base import read_yaml
from lib.core.errors import PostflyteError

_FLAG = "--inputs-file"
_parse_args = YamlFileReadingCommand.parse_args
_pretty_print_exception = utils.pretty_print_exception
_union_to_literal = UnionTransformer.async_to_literal


def _parse_args_strictly(self: YamlFileReadingCommand, ctx: click.Context, args: list[str]) -> Any:
    """Refuse what flytekit would drop; flags beside the file win over it."""
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith(f"{_FLAG}=") else [arg])]
    if _FLAG in args[:-1]:
        path = Path(args[args.index(_FLAG) + 1])
        try:
            values = read_yaml(path)
        except PostflyteError as error:
            raise click.BadParameter(str(error), ctx, param_hint=_FLAG) from error
        for key, value in values.items():
            if isinstance(value, bool) or value is None:
                raise click.BadParameter(
                    f"{path}: {key} is {value!r}, expected a number, a text or a mapping", ctx, param_hint=_FLAG
                )
    return _parse_args(self, ctx, args)


def _show_mistake(error: BaseException, verbosity: int = 1) -> None:
    """An error that was raised on purpose in a few words; its traceback with `pyflyte -v`, as for every other error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, PostflyteError):
        cause = cause.__cause__
    if cause is None or verbosity > 0:
        _pretty_print_exception(error, verbosity)
    else:
        click.secho(f"{type(cause).__name__}: {cause}", fg="red", err=True)


async def _to_literal_or_why(self: Any, ctx: FlyteContext, value: Any, kind: Any, expected: LiteralType) -> Literal:
    """What the type raises that an optional input has beside None, in place of flytekit's "cannot convert"."""
    try:
        return await _union_to_literal(self, ctx, value, kind, expected)
    except TypeTransformerFailedError:
        if value is not None and UnionTransformer.is_optional_type(kind):
            given = UnionTransformer.get_sub_type_in_optional(kind)
            await TypeEngine.async_to_literal(ctx, value, given, TypeEngine.to_literal_type(given))
        raise


def install() -> None:
    """Wrap the three functions; calling it again changes nothing."""
    UnionTransformer.async_to_literal = _to_literal_or_why
    YamlFileReadingCommand.parse_args = _parse_args_strictly
    utils.pretty_print_exception = _show_mistake
