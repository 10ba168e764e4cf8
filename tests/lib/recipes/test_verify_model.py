"""The check of a folder: what it compares is really compared. With vLLM it runs as `make verify-model MODEL=<folder>`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from lib.cluster.local import LocalGroup
from lib.models.decoder import Decoder
from lib.models.families import FAMILIES
from lib.models.hf_io import load_full, read_spec
from lib.recipes.verify_model import check_model, greedy, round_trip
from tasks import verify_model
from tests.lib.models.checkpoints import family_model
from tests.lib.models.test_hf_fallback import fallback_model


def load(folder: Path) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    return decoder


def test_greedy_takes_the_most_probable_token_each_time() -> None:
    """Logits that favour the last id plus one, of 5."""
    assert greedy(lambda ids: torch.eye(5)[(ids + 1) % 5], [2], 6) == [3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_comes_back(family: str, tmp_path: Path) -> None:
    folder, out = family_model(tmp_path / "source", family), tmp_path / "out"
    out.mkdir()
    num_tensors, lost = round_trip(load(folder), folder, out)
    assert num_tensors == len(load_file(folder / "model.safetensors")) and not lost


def test_a_bit_that_does_not_is_named(tmp_path: Path) -> None:
    folder, out = family_model(tmp_path / "source", "llama"), tmp_path / "out"
    out.mkdir()
    decoder = load(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert round_trip(decoder, folder, out)[1] == ["model.norm.weight"]


def test_of_a_folder_without_family_it_says_what_is_not_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """[D9] Transformers computes it: masks, continuations and the way out are compared, a weight that is rounded on its way is
    a problem; that nothing else computes it, and that vLLM has no attention for heads of 8 numbers, is said."""
    folder = fallback_model(tmp_path / "source", "phi", dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    odd = "model.final_layernorm.weight"
    tensors[odd] = tensors[odd].float() + 1e-4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("sys.argv", ["verify_model", str(folder)])
    status = verify_model.main()
    *lines, verdict = capsys.readouterr().out.splitlines()
    found = json.loads(verdict)
    assert (status, found["family"], found["configs"]) == (1, "transformers", 0)
    assert found["problems"] == [f"{odd} did not come back from a round trip"] == lines[:1]
    assert 0 < found["max_logit_diff"] <= 1e-5 and 0 < found["packed_diff"] <= 1e-5 and found["greedy_tokens"] == 48
    assert found["tensors"] == len(tensors) - 1 and found["vllm_logprob_diff"] is None
    numbers, generation = found["not_proven"]
    assert "no second code to compare with" in numbers and "head_dim=8" in generation
    assert lines[1:] == [f"not proven: {numbers}", f"not proven: {generation}"]


def test_a_classifier_is_checked_but_for_what_it_cannot_do(tmp_path: Path) -> None:
    source, folder = family_model(tmp_path / "source", "qwen3"), tmp_path / "model"
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=3, dtype="bfloat16").save_pretrained(folder)
    for path in source.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    (tmp_path / "work").mkdir()
    found = check_model(folder, tmp_path / "work", group_factory=LocalGroup, num_configs=1)
    assert not found.problems and found.max_logit_diff <= 1e-5 and found.family == "qwen3"
    assert found.tensors == len(load_file(folder / "model.safetensors")) - 1, "all but the classifier's own"
    assert found.not_proven == ("continuations and generation in vLLM: a sequence classifier writes no tokens",)
    assert (found.greedy_tokens, found.vllm_logprob_diff) == (0, None)


def test_a_folder_that_is_no_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["verify_model", str(tmp_path)])
    assert verify_model.main() == 1
    assert "config.json: no such file" in capsys.readouterr().err
