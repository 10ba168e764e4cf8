"""Chat templates run with little memory and time."""

from pathlib import Path

import pytest

from lib.core.errors import TokenizerError
from lib.tokens.sandbox import template_problem
from lib.tokens.tokenizer import Tokenizer
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

_HOSTILE = {
    "memory": ("{{ 'a' * 50000000 }}", "needs more than 32 MiB"),
    "memory that isn't written": ("{% set x = ['a'] * 50000000 %}", "needs more than 32 MiB"),
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    "endless text": ("{% for a in range(99999) %}" + "a" * 99 + "{% endfor %}", "needs more than"),
    "great range": ("{% for a in range(100000000) %}{% endfor %}", "OverflowError"),
    "only with many messages": ("{% if messages | length > 50 %}{{ 'a' * 50000000 }}{% endif %}", "needs more than"),
    "no Jinja": ("{% for %}", "TemplateSyntaxError"),
    "deep nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError|crashed"),
}


@pytest.mark.parametrize(("template", "reason"), _HOSTILE.values(), ids=_HOSTILE)
def test_hostile_template_ends_in_an_error(tmp_path: Path, template: str, reason: str) -> None:
    """[M13] Before it is ever rendered in this process; the error names the folder."""
    folder = tiny_tokenizer(tmp_path / "tiny", template=template + CHATML_TEMPLATE)
    with pytest.raises(TokenizerError, match=reason) as caught:
        Tokenizer.load(folder)
    assert str(folder) in str(caught.value)


def test_honest_templates_pass_and_reach_nothing() -> None:
    """Those that refuse a conversation too; attributes that lead out of the sandbox give nothing."""
    for template in (
        CHATML_TEMPLATE,
        "{{ raise_exception('roles must alternate') }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ strftime_now('%d') }}{{ tools | tojson(indent=4) }}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
    ):
        assert template_problem(template, (("bos_token", "<s>"),)) is None
