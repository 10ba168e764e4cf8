"""Laws of the planner: what it says of tasks is what a run does, and what can't work is refused by name, without weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from flytekit import task, workflow
from flytekit.core.local_cache import LocalTaskCache

from lib.config.vocabulary import VocabularyConfig
from lib.core.artifact import stage_artifact
from lib.core.errors import UserError
from lib.models.admit import prepare_model
from lib.models.hf_io import read_spec
from lib.models.shapes import CONFIGS
from tasks import plan
from tasks.artifacts import Dataset, DatasetFolder
from tasks.cache import CACHED
from tasks.preview import preview
from tests.conftest import REPOSITORY
from tests.lib.models.checkpoints import family_model
from tests.tiny import VOCAB_SIZE, tiny_model

LLAMA = REPOSITORY / "configs" / "sft" / "llama3_8b.yaml"
calls: list[str] = []


@task
def look(seed: int) -> int:
    """Not cached, and its output is a plain value."""
    calls.append("look")
    return seed * 2


@task(cache=CACHED)
def make(value: int) -> Dataset:
    calls.append("make")
    folder = DatasetFolder.create()
    with folder.write() as staged:
        (staged.path / "value").write_text(str(value))
    return folder


@task(cache=CACHED)
def use(data: Dataset) -> Dataset:
    calls.append("use")
    folder = DatasetFolder.create()
    with folder.write() as staged:
        (staged.path / "used").write_text((data.open() / "value").read_text())
    return folder


@workflow
def chain(seed: int) -> Dataset:
    return use(data=make(value=look(seed=seed)))


@pytest.fixture
def own_cache(fresh_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache of this test's own."""
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "true")
    monkeypatch.setattr("flytekit.core.local_cache.CACHE_LOCATION", str(tmp_path / "cache"))
    monkeypatch.setattr(LocalTaskCache, "_initialized", False)
    yield
    LocalTaskCache._initialized = False


def states(seed: int) -> list[str]:
    return [state for _, state in preview(chain, {"seed": seed}).tasks]


def test_a_preview_says_what_a_run_does_and_does_nothing(own_cache: None) -> None:
    """Nothing is made by looking; once it is made it is cached; with another input the first task runs, the next may."""
    calls.clear()
    assert states(1) == ["looks", "runs", "depends"] == states(1)
    assert calls == ["look", "look"]
    chain(seed=1)
    assert calls[2:] == ["look", "make", "use"]
    assert states(1) == ["looks", "cached", "cached"]
    assert states(2) == ["looks", "runs", "depends"]
    chain(seed=1)
    assert calls.count("make") == 1


def test_what_is_not_there_is_said(own_cache: None) -> None:
    @task
    def refuse(seed: int) -> int:
        if seed:
            raise UserError(f"{seed} is not there")
        return seed

    @workflow
    def broken(seed: int) -> int:
        return refuse(seed=seed)

    with pytest.raises(UserError, match="3 is not there"):
        preview(broken, {"seed": 3})


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """(exit status, everything said, the JSON object)"""
    status = plan.main([*arguments, "--no-tasks"])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return status, said.out + said.err, json.loads(lines[-1]) if lines else {}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "sft" / "job.yaml"
    path.parent.mkdir(exist_ok=True)
    values = yaml.safe_load(LLAMA.read_text())
    config = {key: {**values["config"].get(key, {}), **section} for key, section in changes.pop("config", {}).items()}
    path.write_text(yaml.safe_dump({**values, **changes, "config": {**values["config"], **config}}))
    return str(path)


def test_a_cluster_job_is_planned_from_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    """8.03 B weights on 32 GPUs: 12 bytes each over 32 ranks; 2,000 steps of 64 rows of 8,192 tokens."""
    status, text, found = planned(capsys, "--config", str(LLAMA), "--shape", "llama-3.1-8b")
    assert status == 0 and "shard 32" in text
    assert found["parameters"] == found["trained_parameters"] == 8_030_261_248
    memory = found["memory_bytes"]
    assert memory["parameters"] + memory["optimizer"] == pytest.approx(12 * 8.030e9 / 32, rel=1e-3)
    assert found["tokens"] == 2000 * 64 * 8192 and found["mesh"]["shard"] == 32
    assert 0 < found["step"]["mfu"] < 0.45 and found["fits"]


def test_what_does_not_fit_is_said_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    """8 B weights and moments are 96 GB: more than one GPU has."""
    arguments = ("--config", str(LLAMA), "--shape", "llama-3.1-8b", "--nodes", "1", "--gpus-per-node", "1")
    status, text, found = planned(capsys, *arguments)
    assert status == 1 and not found["fits"]
    assert "DOES NOT FIT" in text and "config.model.lora" in text and "reduce_gradients: each_micro_batch" in text


def test_gradients_summed_up_in_each_micro_batch_make_room(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """64 rows on 8 GPUs: 8 micro-batches, whose gradients are 4 bytes a weight, or an eighth of that."""
    held = {}
    for reduced in ("each_step", "each_micro_batch"):
        path = written(tmp_path, gpus_per_node=8, nodes=1, config={"train": {"reduce_gradients": reduced}})
        status, text, found = planned(capsys, "--config", path, "--shape", "llama-3.1-8b")
        assert status == 0 and ("gradients summed up in each" in text) == (reduced == "each_micro_batch")
        held[reduced] = found["memory_bytes"]["gradients"]
    assert held["each_step"] == pytest.approx(4 * 8.030e9, rel=1e-2) and held["each_step"] > 4 * held["each_micro_batch"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": 3}, "is not a multiple of the 24 ranks"),
        ({"sequense_length": 8}, "no input 'sequense_length'"),
        ({"config": {"model": {"compute_dtype": "int8"}}}, "model.compute_dtype: Input should be"),
        ({"config": {"parallel": {"replicate": 3}}}, "replicate 3 doesn't make 32 ranks"),
        ({"evaluation": {"max_rows": 0}}, "max_rows"),
        ({"config": {"model": {"lora": {"targets": ["experts"]}}}}, "has no 'experts'"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, _ = planned(capsys, "--config", written(tmp_path, **changes), "--shape", "llama-3.1-8b")
    assert status == 1 and words in text


def test_a_model_elsewhere_needs_a_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, text, _ = planned(capsys, "--config", str(LLAMA))
    assert status == 1 and "give --shape" in text and "qwen3-8b" in text
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3-0.6b"]))
    status, text, found = planned(capsys, "--config", str(LLAMA), "--model", str(tmp_path))
    assert status == 0 and found["parameters"] == 596_049_920, "config.json alone is enough"


@pytest.mark.parametrize(
    ("rows", "tokens", "more"), [(VOCAB_SIZE, 100, 100), (VOCAB_SIZE + 50, 10, 0), (VOCAB_SIZE + 50, 51, 1)], ids=str
)
def test_added_tokens_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: int, tokens: int, more: int
) -> None:
    """[D6] After the tokenizer's ids; rows that are there without an id are taken first. The parameters are those of the model
    that is prepared."""
    folder = tiny_model(tmp_path / "model", vocab_size=rows, tie_word_embeddings=False)
    path = written(tmp_path, gpus_per_node=1, nodes=1, vocabulary={"ranges": [{"pattern": "<i{}>", "count": tokens}]})
    status, _, found = planned(capsys, "--config", path, "--model", str(folder))
    assert status == 0 and found["parameters"] == read_spec(folder)[1].num_parameters + 2 * more * 64
    with stage_artifact(tmp_path / "prepared", "model") as staged:
        vocabulary = VocabularyConfig.parse({"ranges": [{"pattern": "<i{}>", "count": tokens}]}, where="test")
        prepare_model(folder, vocabulary, staged)
    assert staged.counts["parameters"] == found["parameters"]


def test_added_tokens_of_a_model_elsewhere_get_a_row_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a tokenizer nobody knows which rows are free: 4,096 more of 1,024 numbers, whose head is tied."""
    path = written(tmp_path, vocabulary={"special": ["<a>"], "ranges": [{"pattern": "<i{}>", "count": 4095}]})
    status, _, found = planned(capsys, "--config", path, "--shape", "qwen3-0.6b")
    assert status == 0 and found["parameters"] == 596_049_920 + 4096 * 1024


@pytest.mark.parametrize(
    ("vocabulary", "words"),
    [({"special": ["<|im_end|>"]}, "'<|im_end|>' is there already"), ({"eos_token": "<end>"}, "eos_token '<end>' is no token")],
)
def test_tokens_that_cannot_be_added_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, vocabulary: dict[str, Any], words: str
) -> None:
    folder = tiny_model(tmp_path / "model")
    status, text, _ = planned(capsys, "--config", written(tmp_path, vocabulary=vocabulary), "--model", str(folder))
    assert status == 1 and words in text


def test_a_model_in_mxfp4_is_planned_as_what_it_is_decoded_into(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = family_model(tmp_path / "model", "gpt_oss")
    values = json.loads((folder / "config.json").read_text())
    _, _, plain = planned(capsys, "--config", str(LLAMA), "--model", str(folder))
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "mxfp4"}}))
    status, _, found = planned(capsys, "--config", str(LLAMA), "--model", str(folder))
    assert status == 0 and {**found, "job": {}} == {**plain, "job": {}}


def test_heads_are_planned_without_a_vocabulary_they_dont_have(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a head of kind lm, no token is projected; a folder that names no training workflow is refused."""
    path = REPOSITORY / "configs" / "heads" / "smollm2_chain_sum.yaml"
    values = yaml.safe_load(path.read_text())
    (tmp_path / "heads").mkdir()
    alone = tmp_path / "heads" / "alone.yaml"
    values["config"]["heads"] = [{"name": "reward", "kind": "scalar"}]
    alone.write_text(yaml.safe_dump(values))
    both, one = (planned(capsys, "--config", str(name), "--shape", "smollm2-135m")[2] for name in (path, alone))
    assert both["memory_bytes"]["logits"] > 0 == one["memory_bytes"]["logits"]
    assert both["step"]["flops"] > one["step"]["flops"]
    status, text, _ = planned(capsys, "--config", str(REPOSITORY / "configs" / "data" / "chain_sum.yaml"))
    assert status == 1 and "names no workflow that trains; those are sft, heads" in text
