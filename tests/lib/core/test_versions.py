"""The libraries that decide the numbers are found with the versions that are installed."""

import torch
import transformers

from lib.core.versions import library_versions


def test_the_recorded_versions_are_those_that_run() -> None:
    assert library_versions()["torch"] == torch.__version__
    assert library_versions()["transformers"] == transformers.__version__
