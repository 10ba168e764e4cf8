"""A whole evaluation of a tiny model with a real engine on Ray, and what is refused before one starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lib.cluster.ray_backend import RayGroup
from lib.config.data import DataConfig
from lib.config.evaluation import EvalConfig
from lib.core.artifact import stage_artifact
from lib.core.errors import ConfigError, DataError
from lib.core.examples import Conversation, Message
from lib.data.rows import ingest_dataset
from lib.data.table import ExampleTable
from lib.evals.loss import row_losses
from lib.models.admit import admit_model
from lib.models.decoder import Decoder
from lib.models.hf_export import write_hf_folder
from lib.models.hf_io import CheckpointReader, load_full, read_json, read_spec
from lib.recipes.evaluate import chat_encoder, run_evaluation
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from tests.local_ray import ray_here as ray_here
from tests.tiny import CHATML_TEMPLATE, tiny_model, tiny_tokenizer

NUM_ROWS = 21
CONFIG = EvalConfig(max_new_tokens=8, max_rows=18, engine_threads=1, kv_cache_gib=0.0625)

Ingest = Callable[[list[dict[str, Any]]], Path]


def _row(index: int, **changes: Any) -> dict[str, Any]:
    """Every third row has no answer: its loss counts, its generation isn't asked for."""
    question = {"role": "user", "content": f"What is the sum of {index} and {index + 1}?"}
    row = {"id": f"row-{index}", "messages": [question, {"role": "assistant", "content": f"The answer is {2 * index + 1}."}]}
    return row | ({"answer": str(2 * index + 1)} if index % 3 else {}) | changes


@pytest.fixture(scope="module")
def ingest(tmp_path_factory: pytest.TempPathFactory) -> Ingest:
    def ingest_rows(rows: list[dict[str, Any]]) -> Path:
        folder = tmp_path_factory.mktemp("data")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        with stage_artifact(folder / "dataset", "dataset") as staged:
            ingest_dataset(folder / "rows.jsonl", staged)
        return folder / "dataset"

    return ingest_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    with stage_artifact(root / "artifact", "model") as staged:
        admit_model(tiny_model(root / "source", head_dim=32), staged)  # the smallest that vLLM takes on CPU
    return root / "artifact"


@pytest.mark.usefixtures("ray_here")
def test_rows_stay_aligned_through_engines_and_loss(model: Path, ingest: Ingest) -> None:
    """Two engines share the prompts; answers and losses belong to their rows, in order, and the progress counts each once."""
    data = ingest([_row(index) for index in range(NUM_ROWS)])
    shown: list[int] = []
    config = CONFIG.model_copy(update={"engines": 2})
    report = run_evaluation(model, data, config, group_factory=RayGroup, progress=shown.append)

    answered = [index for index in range(18) if index % 3]
    assert [row.id for row in report.rows] == [f"row-{index}" for index in answered]
    assert [row.expected for row in report.rows] == [str(2 * index + 1) for index in answered]
    assert report.num_eval == len(answered) == 12
    assert all(0 < row.num_tokens <= 8 and row.mean_logprob < 0.0 for row in report.rows)
    assert len({row.answer for row in report.rows}) > 1
    assert report.num_correct == sum(row.correct for row in report.rows)
    assert report.interval[0] <= report.accuracy <= report.interval[1]
    assert shown == sorted(shown)
    assert shown[-1] == 12 + 18

    tokenizer = Tokenizer.load(model)
    decoder = Decoder(read_spec(model)[1])
    load_full(decoder, model)
    encoded = ChatEncoder(tokenizer).encode(ExampleTable.open(data, Conversation).rows(range(18)))
    alone = row_losses(decoder, encoded, tokens_per_pack=1, pad_id=0)
    assert report.num_loss_tokens == sum(count for _, count in alone)
    assert report.loss == pytest.approx(sum(loss for loss, _ in alone) / report.num_loss_tokens, rel=1e-6)


def _no_group(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("started workers for input that should have been refused")


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([_row(0), _row(3)], "none of the 2 evaluation rows has an 'answer'"),
        ([_row(1), _row(2, answer="many")], r"rows.jsonl:2: the answer 'many' is not a number"),
        (
            [_row(1, messages=[{"role": "user", "content": "9 " * 5000}, {"role": "assistant", "content": "9"}])],
            r"'row-1' has a prompt",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_starts(
    model: Path, ingest: Ingest, rows: list[dict[str, Any]], problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        run_evaluation(model, ingest(rows), CONFIG, group_factory=_no_group, progress=lambda _: None)


DATED = CHATML_TEMPLATE.replace("system\nYou are", "system\nToday is ' + strftime_now('%d %B %Y') + '. You are")
TABLE = json.dumps({"roles": {"user": ["Q: ", "\n"], "assistant": ["A: ", "<|endoftext|>\n"]}})
"""Its turns end in another token than the tokenizer's eos."""


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        (CHATML_TEMPLATE, {"train_on": "last_assistant_turn"}),
        (CHATML_TEMPLATE, {"chat_format": "table", "chat_table": TABLE}),
        (DATED, {"template_date": "2024-07-26"}),
    ],
)
def test_a_model_is_asked_as_it_was_trained(tmp_path: Path, template: str, settings: dict[str, Any]) -> None:
    """[A1] The prompt of an evaluation is what training saw before the answer, to the token, and generation stops at the
    token that training closed the answer with: the folder that training wrote, admitted as a model, says in what format."""
    source = tiny_model(tmp_path / "source")
    tiny_tokenizer(source, template=template)
    trained = ChatEncoder.of(Tokenizer.load(source), DataConfig(**settings))
    (tmp_path / "hf").mkdir()
    reader = CheckpointReader(source)
    tensors = ((name, reader.get(name)) for name in reader.names())
    write_hf_folder(tmp_path / "hf", tensors, source, chat=trained)
    with stage_artifact(tmp_path / "model", "model") as staged:
        admit_model(tmp_path / "hf", staged)

    asked = chat_encoder(tmp_path / "model", EvalConfig())
    turns = ("user", "What is 1 + 2?"), ("assistant", "The sum is 3."), ("user", "And 2 + 2?"), ("assistant", "4")
    row = Conversation("a", tuple(Message(role, text) for role, text in turns), "rows:1")  # type: ignore[arg-type]
    prompt, whole = asked.render_prompt(row), trained.encode([row])[0]
    last = len(whole.loss_mask) - whole.loss_mask[::-1].index(True)
    assert whole.token_ids[: len(prompt)] == prompt
    assert all(whole.loss_mask[len(prompt) : last])
    assert whole.token_ids[last - 1] in asked.stop_ids
    stops = sorted(asked.stop_ids)
    assert read_json(tmp_path / "model" / "generation_config.json")["eos_token_id"] == (stops if stops[1:] else stops[0])
    with pytest.raises(ConfigError, match="leave them out to ask it as it was trained"):
        chat_encoder(tmp_path / "model", EvalConfig(chat_format="harmony"))


def test_a_table_without_its_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="go with a chat_format"):
        EvalConfig.parse({"chat_table": TABLE}, where="config")
