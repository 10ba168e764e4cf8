"""Names become paths only when they can't leave the folder."""

import pytest

from lib.core.errors import ConfigError
from lib.core.paths import artifact_store, home, mlflow_uri, safe_name

HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc",
    "a\x00b",
    "a\nb",
    ".hidden",
    "-rf",
    "a b",
    "é",
    "%2e%2e/",
    "x" * 129,
    "a\\b",
    "~",
    "$HOME",
    "a;b",
    "．．",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    """[L5]"""
    with pytest.raises(ConfigError, match=r"run name .* can't be a file name"):
        safe_name(name, what="run name")


@pytest.mark.parametrize("name", ["a", "run-1", "x" * 128, "v1.2_3"])
def test_a_plain_name_passes_unchanged(name: str) -> None:
    assert safe_name(name, what="run name") == name


def test_the_home_is_chosen_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("POSTFLYTE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert str(home()) == str(tmp_path)
    assert artifact_store().parent == home()
    assert mlflow_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert mlflow_uri() == "http://tracker:5000"
