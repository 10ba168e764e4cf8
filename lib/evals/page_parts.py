"""What pages are made of. All text that comes in is escaped, but for what is said to be HTML."""

import html
from collections.abc import Mapping, Sequence

from lib.evals.deck_style import CSS

MASK_LEGEND = "<p>Highlighted tokens are trained; the rest is context.</p>"


def document(title: str, tiles: Sequence[tuple[str, str, str]], sections: Sequence[str], warnings: Sequence[str] = ()) -> str:
    """A whole page, with nothing beside it.

    Args:
        tiles: (name, value, remark) of the figures at the top.
        sections: HTML, as `section` makes it.
    """
    alerts = "".join(f'<p class="warning">{text(warning)}</p>' for warning in warnings)
    shown = "".join(
        f'<div class="tile"><span>{text(name)}</span><b>{text(value)}</b><small>{text(remark)}</small></div>'
        for name, value, remark in tiles
    )
    head = f'<head><meta charset="utf-8"><title>{text(title)}</title><style>{CSS}</style></head>'
    return (
        f'<!doctype html><html lang="en">{head}<body>'
        f'<main><header><h1>{text(title)}</h1></header>{alerts}<div class="tiles">{shown}</div>'
        f"{''.join(sections)}</main></body></html>"
    )


def section(title: str, body: str, *, wide: bool = False) -> str:
    """A box of HTML under a heading; `wide` puts what is in it side by side."""
    return f"<section{' class=wide' if wide else ''}><h2>{text(title)}</h2>{body}</section>"


def facts_table(values: Mapping[str, str]) -> str:
    """Names and values; empty where there are none."""
    rows = "".join(f"<tr><td>{text(name)}</td><td><code>{text(value)}</code></td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>" if rows else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a head; nothing but "none" where there are no rows."""
    if not rows:
        return '<p class="none">none</p>'
    lines = [f"<tr>{''.join(f'<th>{text(name)}</th>' for name in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{text(value)}</td>' for value in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def gauge(title: str, share: float) -> str:
    """A bar that is filled to a share from 0 to 1."""
    filled = f"{share:.2%}"
    return f'<p>{text(title)}: <b>{filled}</b></p><div class="gauge"><i style="width:{filled}"></i></div>'


def text(value: str) -> str:
    """As HTML that shows just it."""
    return html.escape(value)
