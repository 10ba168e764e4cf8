"""Training ids are serving ids; the campaign over all tokenizers is `make parity`."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.timeout(900)
def test_ids_of_training_are_those_that_vllm_feeds_the_model() -> None:
    """[A6] Qwen3's real tokenizer, 17 fuzzed strings and 12 prompts with tools and thinking: the ids of AutoTokenizer, ours
    and those of vLLM's own tokenizer and chat renderer are equal. In a process of its own: vLLM changes what it finds."""
    command = [sys.executable, "-m", "tests.parity", "--strings", "17", "--conversations", "12", "--formats", "qwen3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["parity"]["qwen3"]
    assert found.pop("strings") == 17 and found.pop("prompts") == 12
    assert set(found.values()) == {0}
