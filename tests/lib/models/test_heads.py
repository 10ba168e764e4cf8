"""Laws of output heads: packed == alone, and what is saved is what transformers and we read again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lib.config.heads import HeadsConfig
from lib.core.artifact import stage_artifact
from lib.core.errors import ConfigError, ModelError
from lib.models.admit import admit_model
from lib.models.families import FAMILIES
from lib.models.head_io import check_storable, read_heads, write_headed_folder
from lib.models.heads import HeadedDecoder
from lib.models.hf_io import read_json, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.parallel.load import full_heads, full_tensors, load_heads, load_sharded
from lib.parallel.plan import Part, part_of
from tests.lib.models.batches import packed
from tests.lib.models.checkpoints import family_model
from tests.tiny import VOCAB_SIZE

SCALAR = {"name": "reward", "kind": "scalar"}
CLASSES = {"name": "topic", "kind": "classification", "labels": ["news", "jobs", "other"]}
MANY = [{"name": "text", "kind": "lm"}, SCALAR, CLASSES, {"name": "worth", "kind": "scalar", "per": "token"}]
LENGTHS = [[5, 9, 3], [12, 1]]


def config(*heads: dict[str, Any]) -> HeadsConfig:
    return HeadsConfig.parse({"heads": list(heads)}, where="heads")


def headed(folder: Path, heads: HeadsConfig, *, seed: int = 0) -> HeadedDecoder:
    with torch.device("meta"):
        module = HeadedDecoder(read_spec(folder)[1], heads)
    load_sharded(module, folder)
    load_heads(module, folder, seed=seed)
    return module


def save(module: HeadedDecoder, source: Path, out: Path) -> Path:
    out.mkdir()
    write_headed_folder(out, full_tensors(module), full_heads(module), module.config, source)
    return out


@torch.no_grad()
def outputs(module: HeadedDecoder) -> dict[str, torch.Tensor]:
    return module(*packed(LENGTHS, 20, VOCAB_SIZE))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_packed_document_puts_out_what_it_does_alone(tmp_path: Path, family: str) -> None:
    """[B1] By document at its last token, by token at each; nothing of padding or of other documents."""
    module = headed(family_model(tmp_path, family, dtype="float32"), config(*MANY))
    token_ids, positions, layout = packed(LENGTHS, 20, VOCAB_SIZE)
    together = outputs(module)
    assert {name: tuple(value.shape) for name, value in together.items()} == {"reward": (5,), "topic": (5, 3), "worth": (2, 20)}
    for number, span in enumerate(layout.spans):
        place = (slice(span.row, span.row + 1), slice(span.start, span.end))
        alone_layout = DocumentLayout.from_document_ids(torch.zeros(1, span.length))
        with torch.no_grad():
            alone = module(token_ids[place], positions[place], alone_layout)
        assert (together["reward"][number] - alone["reward"][0]).abs() <= 1e-5
        assert (together["topic"][number] - alone["topic"][0]).abs().max() <= 1e-5
        assert (together["worth"][place] - alone["worth"]).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [SCALAR, CLASSES], ids=["scalar", "classification"])
@torch.no_grad()
def test_a_head_alone_is_transformers_sequence_classifier(tmp_path: Path, family: str, head: dict[str, Any]) -> None:
    """Saved under the class that transformers has for the family; it opens there with the same labels and equal outputs, and
    here with equal bits; the language model's head is not in it."""
    source = family_model(tmp_path / "source", family, dtype="float32", tie_word_embeddings=False)
    module = headed(source, config(head))
    out = save(module, source, tmp_path / "out")
    assert read_json(out / "config.json")["architectures"] == [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[family]]
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    names = head.get("labels", ["reward"])
    assert theirs.config.id2label == dict(enumerate(names))
    assert theirs.config.label2id == {name: number for number, name in enumerate(names)}
    token_ids, _, layout = packed(LENGTHS, 20, VOCAB_SIZE)
    ours = outputs(module)[head["name"]]
    for number, span in enumerate(layout.spans):
        expected = theirs(token_ids[span.row : span.row + 1, span.start : span.end], use_cache=False).logits[0]
        assert (ours[number] - expected).abs().max() <= 1e-5
    again = outputs(headed(out, config(head), seed=1))
    assert torch.equal(again[head["name"]], ours)


@pytest.mark.parametrize("heads", [MANY, MANY[1:]], ids=["with lm", "without"])
@torch.no_grad()
def test_several_heads_are_kept_beside_a_model_that_transformers_opens(tmp_path: Path, heads: list[dict[str, Any]]) -> None:
    """All outputs come back bit for bit, through an artifact too; the language model is as without heads, also where it is none
    of them and its output matrix is not in memory."""
    source = family_model(tmp_path / "source", "llama", dtype="float32", tie_word_embeddings=False)
    module = headed(source, config(*heads))
    out = save(module, source, tmp_path / "out")
    with stage_artifact(tmp_path / "model", "model") as staged:
        admit_model(out, staged)
    again = outputs(headed(tmp_path / "model", config(*heads), seed=1))
    assert all(torch.equal(again[name], value) for name, value in outputs(module).items())
    ids = torch.arange(20)[None]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder)(ids, use_cache=False).logits for folder in (out, source))
    assert torch.equal(ours, theirs)
    assert load_file(out / "heads" / "heads.safetensors").keys() == {"reward", "topic", "worth"}


@torch.no_grad()
def test_a_classifier_of_transformers_is_read(tmp_path: Path) -> None:
    """[D5] Without heads.json: its labels from the config, in the order of their numbers (10 after 2), its weight from the
    model's files."""
    source = family_model(tmp_path / "source", "qwen3", dtype="float32")
    theirs = AutoModelForSequenceClassification.from_pretrained(source, num_labels=12)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = read_heads(tmp_path / "theirs")
    assert saved is not None
    assert [(head.name, head.labels) for head in saved.config.heads] == [("score", tuple(f"LABEL_{n}" for n in range(12)))]
    ids = torch.arange(9)[None]
    layout = DocumentLayout.from_document_ids(torch.zeros_like(ids))
    found = headed(tmp_path / "theirs", saved.config)(ids, ids, layout)["score"]
    assert (found - theirs.eval()(ids, use_cache=False).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_a_folder_changes_its_kind_without_a_trace(tmp_path: Path) -> None:
    """Several heads, then one of them alone, then that with others again: each time what is written says and holds what the run
    had, and the head that goes on keeps its bits."""
    source = family_model(tmp_path / "source", "qwen3", dtype="float32")
    text = {"name": "text", "kind": "lm"}
    both = save(headed(source, config(text, SCALAR)), source, tmp_path / "both")
    alone = save(headed(both, config(SCALAR), seed=1), both, tmp_path / "alone")
    assert read_json(alone / "config.json")["architectures"] == ["Qwen3ForSequenceClassification"]
    assert sorted(path.name for path in (alone / "heads").iterdir()) == ["heads.json"]
    two = save(headed(alone, config(SCALAR, CLASSES), seed=2), alone, tmp_path / "two")
    assert read_json(two / "config.json")["architectures"] == ["Qwen3ForCausalLM"]
    found = [read_heads(folder) for folder in (both, alone, two)]
    assert [saved and [head.name for head in saved.config.heads] for saved in found] == [
        *(["text", "reward"], ["reward"], ["reward", "topic"]),
    ]
    weights = [saved.weights["reward"] for saved in found if saved]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert isinstance(headed(two, config(SCALAR, CLASSES)), HeadedDecoder)


def test_several_heads_need_the_language_model_that_they_are_kept_beside(tmp_path: Path) -> None:
    """A sequence classifier whose head was not tied has lost it; that is said before anything is trained."""
    source = family_model(tmp_path / "source", "llama", tie_word_embeddings=False)
    alone = save(headed(source, config(SCALAR)), source, tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"config\.heads: .*alone is a sequence classifier.*train one head"):
        check_storable(config(SCALAR, CLASSES), alone)
    for heads, folder in ((config(SCALAR), alone), (config(*MANY), source), (config(*MANY[1:]), source)):
        check_storable(heads, folder)


def test_new_heads_depend_on_name_and_seed_alone(tmp_path: Path) -> None:
    source = family_model(tmp_path, "llama")
    few, many = full_heads(headed(source, config(SCALAR))), full_heads(headed(source, config(*MANY)))
    assert torch.equal(few["reward"], many["reward"])
    assert not torch.equal(many["reward"], many["worth"])
    assert not torch.equal(few["reward"], full_heads(headed(source, config(SCALAR), seed=1))["reward"])


def test_no_head_of_a_folder_is_lost_in_silence(tmp_path: Path) -> None:
    """A run that lacks a saved head, or has it for other outputs, is refused; so is a folder whose files disagree."""
    source = family_model(tmp_path / "source", "llama")
    out = save(headed(source, config(*MANY)), source, tmp_path / "out")
    with pytest.raises(ModelError, match=r"has a head 'topic'.*name it too"):
        headed(out, config(*(head for head in MANY if head != CLASSES)))
    with pytest.raises(ModelError, match="give the run's another name"):
        headed(out, config(*(head if head != CLASSES else {**CLASSES, "labels": ["a", "b"]} for head in MANY)))
    (out / "heads" / "heads.safetensors").unlink()
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        read_heads(out)
    assert read_heads(source) is None


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ([{**CLASSES, "labels": ["one"]}], "has two or more"),
        ([{**CLASSES, "labels": ["a", "a"]}], "given twice"),
        ([{**SCALAR, "labels": ["a", "b"]}], "labels"),
        ([{**SCALAR, "loss": "cross_entropy"}], "does not fit the kind"),
        ([{**CLASSES, "loss": "logistic"}], "does not fit the kind"),
        ([SCALAR, SCALAR], "one name"),
        ([{"name": "a", "kind": "lm"}, {"name": "b", "kind": "lm"}], "two heads of kind lm"),
        ([{"name": "a", "kind": "lm", "per": "document"}], "by token"),
        ([{**SCALAR, "weight": 0.0}], "nothing would be trained"),
        ([{**SCALAR, "name": "Re-ward"}], "pattern"),
    ],
)
def test_heads_that_contradict_themselves_are_refused(heads: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(*heads)


@pytest.mark.parametrize("name", ["type", "keys", "train", "norm", "head"])
def test_a_head_may_have_any_name(tmp_path: Path, name: str) -> None:
    """One of torch's own too, and one by which weights of the decoder are cut over ranks, as no head is."""
    headed = HeadedDecoder(read_spec(family_model(tmp_path, "llama"))[1], config({**SCALAR, "name": name}))
    assert list(headed.by_name()) == [name]
    ((key, _),) = headed.heads.named_parameters("headed.heads")
    assert part_of(key, headed.decoder.spec) == Part.WHOLE
