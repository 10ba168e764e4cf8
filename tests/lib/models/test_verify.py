"""The logit report admits what is right and nothing else."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from lib.core.artifact import stage_artifact, verify
from lib.core.errors import ArtifactCorruptError, ModelError
from lib.models.families import FAMILIES
from lib.models.logit_report import LogitReport, read_logit_report, write_logit_report
from lib.models.verify import build_logit_report, compare_checkpoint, compare_random, greatest
from lib.models.verify_configs import random_case
from tests.gate import __main__ as gate
from tests.lib.models.checkpoints import family_model
from tests.lib.models.mutants import MUTANTS, is_rejected, planted
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> LogitReport:
    return build_logit_report(tiny_model(tmp_path_factory.mktemp("verify") / "model"))


def test_forty_random_models_agree_with_transformers(report: LogitReport) -> None:
    """[D8, B1] Logits <= 1e-5 absolute, packed and alone; gradients <= 1e-5 of the greatest; no bit leaks."""
    assert report.passed and not report.problems and report.num_configs == len(report.cases) == 40
    assert report.max_logit_diff <= 1e-5 and report.packed_diff <= 1e-5 and report.max_grad_diff <= 1e-5
    assert all(case.leaked == 0 and 0.5 < case.max_logit < 10.0 for case in report.cases)
    assert report.checkpoint.logit_diff <= 1e-5 * report.checkpoint.max_logit


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_random_models_of_each_family_agree_with_transformers(family: str) -> None:
    """[D8, B1, B6, E4, E7] Every config that takes its turn; `make verify-model FAMILY=all` draws 40 of each."""
    for index in range(8):
        result = compare_random(random_case(family, 0, index), index)
        assert not result.problems() and result.leaked == 0 and 0.3 < result.max_logit < 10.0


@pytest.mark.parametrize(
    ("mutant", "where"),
    [
        ("window: one key too many", "input of layers.0.attn.o (transformers: model.layers.0.self_attn.o_proj)"),
        ("mlp: gelu", "input of layers.0.mlp.down"),
        ("router: always divided", "output of layers."),
        ("head: cap left out", "no activation differs"),
    ],
)
def test_the_first_tensor_that_differs_is_named(mutant: str, where: str) -> None:
    with planted(mutant) as fresh:
        results = [fresh.compare_random(fresh.random_case(MUTANTS[mutant][0], 0, index), index) for index in range(8)]
    found = [str(result.first_difference) for result in results if result.problems()]
    assert found and found[0].startswith(where), found
    assert not any(result.first_difference for result in results if not result.problems())


def test_the_verdict_is_json_that_names_module_and_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the command that admits a family, run over code with a fault: an agent reads from it where to look."""
    with planted("mlp: gelu") as fresh:
        monkeypatch.setattr(gate, "compare_random", fresh.compare_random)
        monkeypatch.setattr(gate, "random_case", fresh.random_case)
        figures = json.loads(json.dumps(gate.verify_family("llama", 2, 0)))
    where = figures["first_difference"]
    assert len(figures["problems"]) >= 2 and figures["max_logit_diff"] > 1e-5
    assert (where["module"], where["side"], where["reference_module"]) == (
        *("layers.0.mlp.down", "input"),
        "model.layers.0.mlp.down_proj",
    )
    assert where["size"] > 1e-4 and where["gradient"].startswith("layers.") and where["model"].startswith("llama, ")


def test_a_family_whose_file_raises_has_a_verdict_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in it is a problem with its place, once for all models; a fault that can't be planted is one that passes."""
    found, slips = {}, {"slip": ("qkv_bias=True", "qkv_bia=True"), "name": ("family=MODEL_TYPE", 'family="qwen"')}
    for name, (old, new) in slips.items():
        with monkeypatch.context() as patch:
            patch.setitem(MUTANTS, name, ("qwen2", "qwen2", old, new))
            with planted(name) as fresh:
                patch.setattr(gate, "compare_random", fresh.compare_random)
                patch.setattr(gate, "random_case", fresh.random_case)
                found[name] = gate.verify_family("qwen2", 2, 0)
    monkeypatch.setitem(MUTANTS, "gone", ("qwen2", "qwen2", "no such line", ""))
    (problem,) = found["slip"]["problems"]
    assert problem.startswith("TypeError in ") and "qwen2.py:" in problem and problem.endswith("keyword argument 'qkv_bia'")
    assert found["slip"]["configs"] == 0 and found["name"]["configs"] == 2
    assert found["name"]["problems"] == ["spec_from_config calls the family 'qwen'; its MODEL_TYPE is 'qwen2'"]
    verdict = gate.verify_faults(["qwen2"])
    assert verdict["mutants"] == verdict["rejected"] + 1 and "the mutant must follow the code" in verdict["not_noticed"][0]
    assert gate.verify_faults(["unheard_of"])["not_noticed"] == ["none of unheard_of is planted"]


def test_the_random_models_cover_the_config(report: LogitReport) -> None:
    """[D8] Tied and untied, each rope, each bias, head_dim of its own, one and many groups: all are drawn."""
    text = "\n".join(case.model for case in report.cases)
    ropes = ["rope default", "rope linear", "rope llama3"]
    biases = [f"biases {first}/{second}" for first in (True, False) for second in (True, False)]
    for part in ["tied True", "tied False", *ropes, *biases, "1 layers", "3 layers", "heads of 12", "4/1 heads", "2/2 heads"]:
        assert part in text, part
    assert len(set(text.split("\n"))) == 40


def test_a_report_is_the_same_every_time(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    steps: list[int] = []
    first = build_logit_report(folder, num_configs=3, progress=steps.append)
    assert first == build_logit_report(folder, num_configs=3) and steps == [1, 2, 3, 4]
    assert first != build_logit_report(folder, num_configs=3, seed=1)


def test_a_report_travels_as_an_artifact(report: LogitReport, tmp_path: Path) -> None:
    with stage_artifact(tmp_path / "report", "logit_report") as staged:
        write_logit_report(report, "f" * 64, staged)
    assert verify(tmp_path / "report").meta == {"model": "f" * 64, "passed": True}
    assert read_logit_report(tmp_path / "report") == report.model_copy(update={"model_digest": "f" * 64})
    (tmp_path / "report" / "logit_report.json").write_text('{"passed": true}')
    with pytest.raises(ArtifactCorruptError, match="make it again"):
        read_logit_report(tmp_path / "report")
    with pytest.raises(ArtifactCorruptError, match="no such file"):
        read_logit_report(tmp_path)


def test_a_broken_model_does_not_pass(tmp_path: Path) -> None:
    """A weight that is not a number makes every comparison of the checkpoint fail."""
    folder = tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = build_logit_report(folder, num_configs=1)
    assert not report.passed and report.problems


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_sequence_classifier_is_verified_by_what_its_head_sees(family: str, tmp_path: Path) -> None:
    """[D8] So that a model with one head can be trained further: hidden states after the last norm, packed and alone; in its
    own bfloat16 too. A fault in the decoder below it is found."""
    source = family_model(tmp_path / "source", family, tie_word_embeddings=False)
    kind = AutoModelForSequenceClassification
    kind.from_pretrained(source, num_labels=2, dtype="bfloat16").save_pretrained(tmp_path / "model")
    for path in source.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "model" / path.name)
    report = build_logit_report(tmp_path / "model", num_configs=1)
    assert report.passed and report.checkpoint.max_logit > 0.5, report.problems
    assert report.checkpoint.own_dtype_error > 0
    with planted({"llama": "mlp: gelu", "gemma3_text": "norm: offset left out", "gpt_oss": "sinks: sign"}[family]) as fresh:
        assert fresh.compare_checkpoint(tmp_path / "model", 0).problems()


def test_layers_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """[D5] Layer 10 after 9 and not after 1; a round trip alone, which goes both ways, would not tell."""
    result = compare_checkpoint(family_model(tmp_path, "qwen3", num_hidden_layers=12, hidden_size=32, head_dim=8), 0)
    assert not result.problems()


def test_an_unknown_model_is_an_error_not_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ModelError, match="unknown; known"):
        build_logit_report(tmp_path)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_fault_is_rejected(mutant: str) -> None:
    """[D9] One line is wrong: base, pairing, eps, groups, mask, scale, tying, names...; a few random models show it."""
    assert is_rejected(mutant)


def test_without_a_fault_nothing_is_rejected() -> None:
    """The planting itself changes nothing: the same line put in its own place passes."""
    MUTANTS["none"] = ("llama", "layers.mlp", "silu", "silu")
    try:
        with planted("none") as fresh:
            results = [fresh.compare_random(fresh.random_case("llama", 0, index), index) for index in range(12)]
    finally:
        del MUTANTS["none"]
    assert not any(result.problems() for result in results)


def test_rounding_that_is_coarser_than_transformers_own_is_rejected(tmp_path: Path) -> None:
    """[C8, D9] In the dtype of the checkpoint: hidden states with 3 bits in place of bfloat16's 8, and nothing in float32."""
    folder = family_model(tmp_path, "llama")
    assert not compare_checkpoint(folder, 0).problems()
    rounded = "x_BTD if x_BTD.dtype == torch.float32 else x_BTD.to(torch.float8_e5m2).to(x_BTD.dtype)"
    MUTANTS["coarse"] = ("llama", "decoder", "self.norm(x_BTD)", f"self.norm({rounded})")
    try:
        with planted("coarse") as fresh:
            (problem,) = fresh.compare_checkpoint(folder, 0).problems()
    finally:
        del MUTANTS["coarse"]
    assert "rounding" in problem


@pytest.mark.parametrize("values", [[float("nan"), 1e-6], [1e-6, float("nan")], [1e-6, float("nan"), 2e-6]])
def test_a_difference_that_is_not_a_number_is_never_dropped(values: list[float]) -> None:
    """[D9] A NaN gradient of any one tensor must reach the verdict, wherever it stands."""
    assert math.isnan(greatest(values))
