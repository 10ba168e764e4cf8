"""Marking what an assistant wrote in a ChatML template, so that rendering says which characters are trained."""

import re
from collections.abc import Sequence

from lib.core.errors import TokenizerError
from lib.tokens.tokenizer import Tokenizer, turn_end

_CONTENT = r"(?P<content>(?P<name>\w+)(?:\.content|\[\s*'content'\s*\]|\[\s*\"content\"\s*\]))"
_QUOTED = r"(?P<quote>['\"])(?P<literal>(?:\\.|(?!(?P=quote)).)*)(?P=quote)"
_TURN = re.compile(
    rf"\{{\{{(?P<open>-?)\s*(?P<head>(?:(?!\}}\}}|\{{\{{).)*?\+\s*)?{_CONTENT}\s*\+\s*{_QUOTED}"
    r"(?P<tail>\s*\+(?:(?!\}\}).)*?)?\s*(?P<close>-?)\}\}",
    re.DOTALL,
)
"""`{{ head + message['content'] + '<|im_end|>' + tail }}`: the expression that writes a turn in a ChatML loop."""

_PROBES = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant"),
)


def mark_assistant(tokenizer: Tokenizer) -> str:
    """The tokenizer's template with `{% generation %}` around content and end of each assistant turn.

    The marked template is believed only after it has rendered conversations of several shapes: the same text as the
    original, one span for each assistant turn, each span exactly the content and the token that ends the turn.

    Raises:
        TokenizerError: the template can't be marked, with the reason.
    """
    end = turn_end(tokenizer)
    template = tokenizer.template
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        template, num_marked = _TURN.subn(lambda match: _marked(match, end), template)
        if num_marked == 0 or template == tokenizer.template:
            raise TokenizerError(
                f"{tokenizer.folder}: the chat template has no expression of the form "
                f"{{{{ ... + message['content'] + '{end}' ... }}}}, so the assistant's turns can't be marked; "
                "put {% generation %} ... {% endgeneration %} around content and end of an assistant's turn in it"
            )
    for roles in _PROBES:
        _check(tokenizer, template, roles, end)
    return template


def _marked(match: re.Match[str], end: str) -> str:
    """The expression cut in three, the middle within a generation block where the role is the assistant's."""
    literal = match["literal"]
    if not literal.startswith(end):
        return match[0]
    quote, rest = match["quote"], literal[len(end) :]
    role = match["content"][len(match["name"]) :].replace("content", "role")
    body = f"{{{{ {match['content']} + {quote}{end}{quote} }}}}"
    tail = f"{quote}{rest}{quote}{match['tail'] or ''}"
    is_assistant = f"{match['name']}{role} == 'assistant'"
    # A variable tag at both ends: the newline after a block tag, and the spaces before one, would be eaten.
    return (
        f"{{{{{match['open']} {match['head'] or quote + quote + ' + '}{quote}{quote} }}}}"
        f"{{% if {is_assistant} %}}{{% generation %}}{body}{{% endgeneration %}}{{% else %}}{body}{{% endif %}}"
        f"{{{{ {tail} {match['close']}}}}}"
    )


def _check(tokenizer: Tokenizer, template: str, roles: Sequence[str], end: str) -> None:
    messages = [{"role": role, "content": f" \n{role} {number}\n "} for number, role in enumerate(roles)]
    plain, _ = tokenizer.render(tokenizer.template, messages)
    text, spans = tokenizer.render(template, messages, return_assistant_tokens_mask=True)
    wanted = [message["content"] + end for message in messages if message["role"] == "assistant"]
    found = [text[start:stop] for start, stop in spans]
    if text != plain or found != wanted:
        reason = "renders differently once marked" if text != plain else f"marks {found!r}, expected {wanted!r}"
        raise TokenizerError(
            f"{tokenizer.folder}: the chat template {reason} (roles {', '.join(roles)}); "
            "a loss mask made with it would be wrong; use a template that writes each turn's content unchanged (such as ChatML)"
        )
