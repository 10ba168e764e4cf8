"""Chat templates run with little memory and time."""

from pathlib import Path

import pytest

from lib.core.errors import DataError, TokenizerError
from lib.core.examples import Conversation, Message
from lib.tokens.chat import ChatEncoder
from lib.tokens.sandbox import template_problem
from lib.tokens.tokenizer import Tokenizer
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

_HOSTILE = {
    "memory": ("{{ 'a' * 50000000 }}", "needs more than 32 MiB"),
    "memory that isn't written": ("{% set x = ['a'] * 50000000 %}", "needs more than 32 MiB|processor time"),
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


def test_honest_templates_pass() -> None:
    """Those that refuse a conversation too."""
    for template in (
        CHATML_TEMPLATE,
        "{{ raise_exception('roles must alternate') }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ strftime_now('%d') }}{{ tools | tojson(indent=4) }}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    ):
        assert template_problem(template, (("bos_token", "<s>"),)) is None


_ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__['__builtins__'] }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'].system('touch MARKER') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "{{ ''.join.__self__.__class__ }}",
)


@pytest.mark.parametrize("payload", _ESCAPES)
def test_a_template_that_tries_to_get_out_gets_nothing(tmp_path: Path, payload: str) -> None:
    """[L2] It is refused with its place, or what it reaches for is not there: no class, no file, no command."""
    marker = tmp_path / "marker"
    folder = tiny_tokenizer(tmp_path / "tiny", template=payload.replace("MARKER", str(marker)) + CHATML_TEMPLATE)
    turns = (Message("user", "hello"), Message("assistant", "hi"))
    written = ""
    try:
        encoder = ChatEncoder(Tokenizer.load(folder))
        written = encoder.tokenizer.decode(encoder.encode([Conversation("a", turns, "rows.jsonl:1")])[0].token_ids)
    except (TokenizerError, DataError) as error:
        assert str(folder) in str(error) or "rows.jsonl:1" in str(error)
    assert not marker.exists()
    assert not any(found in written for found in ("<class", "<module", "builtins", "root:"))
