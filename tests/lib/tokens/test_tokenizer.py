"""Laws of the tokenizer wrapper."""

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lib.core.errors import TokenizerError
from lib.tokens.tokenizer import Tokenizer
from tests.lib.tokens.conversations import random_text
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


def test_ids_are_autotokenizers_and_text_comes_back(folder: Path) -> None:
    """[A6] On 2,000 random texts: ids equal AutoTokenizer's, decoding returns the text, before and after saving."""
    ours, auto = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    source = random.Random(0)
    for text in [random_text(source) for _ in range(2000)] + ["", "\x00", "\u202eabc", "a" * 100_000]:
        ids = ours.encode(text)
        assert ids == auto(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text


def test_saved_tokenizer_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").digest == tokenizer.digest
    assert {p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_digest_sees_every_byte_of_every_file(folder: Path, tmp_path: Path, name: str) -> None:
    """[A10] One more byte of white space in any tokenizer file is another tokenizer."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / name).write_text((changed / name).read_text() + " ")
    assert Tokenizer.load(changed).digest != Tokenizer.load(folder).digest


def test_padding_may_equal_eos(folder: Path, tmp_path: Path) -> None:
    """SmolLM2's case: <|im_start|> is 1 and bos, <|im_end|> is 2, eos, pad and the end of a turn."""
    same = Tokenizer.load(folder)
    other = Tokenizer.load(tiny_tokenizer(tmp_path / "other", pad_token="<|endoftext|>"))
    assert (same.bos_id, same.eos_id, same.pad_id, same.stop_ids, same.vocab_size) == (1, 2, 2, (2,), 384)
    assert (other.eos_id, other.pad_id, other.stop_ids) == (2, 0, (2,))


def test_using_a_tokenizer_does_not_change_it(folder: Path) -> None:
    """[A11][A13] Eight threads encode at once: no error, the results of one thread, and the digest stays."""
    tokenizer = Tokenizer.load(folder)
    digest = tokenizer.digest
    texts = [random_text(random.Random(number)) for number in range(200)]
    expected = [tokenizer.encode(text) for text in texts]
    found: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        found[number] = [tokenizer.encode(text) for text in texts]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[number] for number in range(8)] == [expected] * 8
    assert tokenizer.digest == digest


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def _edit_pipeline(folder: Path, **values: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _edit_token(folder: Path, **values: object) -> None:
    path = folder / "tokenizer.json"
    pipeline = json.loads(path.read_text())
    pipeline["added_tokens"][1] |= values
    path.write_text(json.dumps(pipeline))


def _remove_eos(folder: Path) -> None:
    _edit_config(folder, eos_token=None)
    (folder / "special_tokens_map.json").unlink()


_BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("no tokenizer.json", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    ("no config", lambda f: (f / "tokenizer_config.json").unlink(), "no tokenizer_config.json"),
    ("two templates", lambda f: _edit_config(f, chat_template=[{"name": n, "template": "x"} for n in "ab"]), "can't be opened"),
    ("a template that is no Jinja", lambda f: _edit_config(f, chat_template="{% if %}"), "TemplateSyntaxError"),
    ("a token that swallows white space", lambda f: _edit_token(f, lstrip=True), "swallows white space"),
    ("no eos", _remove_eos, "eos_token"),
    (
        "its own code",
        lambda f: _edit_config(f, auto_map={"AutoTokenizer": ["x.Y", None]}),
        "delete auto_map",
    ),
    ("config is a list", lambda f: (f / "tokenizer_config.json").write_text("[]"), "holds a list"),
    ("config not JSON", lambda f: (f / "tokenizer_config.json").write_text("{"), "not JSON"),
    ("pipeline not JSON", lambda f: (f / "tokenizer.json").write_text('{"a":'), "can't be opened"),
    ("text is lost", lambda f: _edit_pipeline(f, normalizer={"type": "Lowercase"}), "comes back as"),
    ("another class rewrites the pipeline", lambda f: _edit_config(f, tokenizer_class="LlamaTokenizerFast"), "tokenizer"),
]


@pytest.mark.parametrize(("damage", "reason"), [case[1:] for case in _BROKEN], ids=[case[0] for case in _BROKEN])
def test_broken_folder_is_refused_with_the_reason(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    folder = tiny_tokenizer(tmp_path / "tiny")
    damage(folder)
    with pytest.raises(TokenizerError, match=reason) as caught:
        Tokenizer.load(folder)
    assert str(folder) in str(caught.value)


def test_turn_end_must_be_a_token(tmp_path: Path) -> None:
    """A template that closes a turn with plain text would train a model that never stops."""
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    with pytest.raises(TokenizerError, match="closes each turn"):
        _ = Tokenizer.load(tiny_tokenizer(tmp_path / "plain", template=template)).stop_ids
