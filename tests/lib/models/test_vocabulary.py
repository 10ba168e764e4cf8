"""Laws of a model that gets more tokens: what was there keeps its bits, and padding is never seen outside of memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.config.vocabulary import VocabularyConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import ConfigError, ModelError, TokenizerError
from lib.core.manifest import file_sha256
from lib.losses.cross_entropy import cross_entropy_sum
from lib.models.admit import prepare_model
from lib.models.decoder import Decoder
from lib.models.hf_export import write_hf_folder
from lib.models.hf_io import CheckpointReader, load_full, read_json, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.vocabulary import extend_model
from lib.parallel.load import full_tensors
from lib.tokens.tokenizer import Tokenizer
from tests.lib.models.adapters import with_adapters
from tests.lib.models.batches import logits
from tests.lib.models.checkpoints import family_model
from tests.tiny import VOCAB_SIZE, tiny_model

TOKEN_IDS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        "tied": tiny_model(root / "tied"),
        "untied": tiny_model(root / "untied", tie_word_embeddings=False, dtype="float32"),
        "sharded": tiny_model(root / "sharded", tie_word_embeddings=False, max_shard_size="60KB"),
        "unused rows": tiny_model(root / "unused", vocab_size=VOCAB_SIZE + 50, tie_word_embeddings=False),
    }


def vocabulary(**values: Any) -> VocabularyConfig:
    return VocabularyConfig.parse(values, where="vocabulary")


def extend(source: Path, out: Path, config: VocabularyConfig, vectors: Path | None = None) -> dict[str, int]:
    out.mkdir()
    return extend_model(source, config, out, vectors=vectors)


def load(folder: Path) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    return decoder


@torch.no_grad()
def decoder_logits(decoder: Decoder) -> torch.Tensor:
    layout = DocumentLayout.from_document_ids(torch.zeros_like(TOKEN_IDS))
    return logits(decoder, TOKEN_IDS, torch.arange(20)[None], layout)[0]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.get(name) for name in reader.names()}


@pytest.mark.parametrize("tied", [True, False])
def test_1_to_130_more_ids_change_no_bit_of_the_others_and_padding_takes_no_part(tied: bool, tmp_path: Path) -> None:
    """[D6] For every count: rows in memory are the next multiple of 64, old logits are the same bits, there is no logit for
    padding, and loss and gradients are those of an embedding without padding, though the padding's weights be anything."""
    decoder = load(tiny_model(tmp_path, tie_word_embeddings=tied, dtype="float32", num_hidden_layers=1))
    before, spec = decoder_logits(decoder), decoder.spec
    old = {name: tensor.detach() for name, tensor in decoder.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 131):
        grown = Decoder(replace(spec, vocab_size=VOCAB_SIZE + number))
        rows = grown.embed.weight.shape[0]
        assert rows % 64 == 0 and 0 <= rows - VOCAB_SIZE - number < 64
        more = torch.randn(rows - VOCAB_SIZE, spec.hidden_size, generator=generator)  # those of the padding too
        vocabulary_rows = {name: torch.cat([old[name], more]) for name in ("embed.weight", "head.weight") if name in old}
        grown.load_state_dict(old | vocabulary_rows)
        after = decoder_logits(grown)
        assert after.shape == (20, VOCAB_SIZE + number)
        assert torch.equal(after[:, :VOCAB_SIZE], before)
        if number % 13 == 0:
            _loss_ignores_padding(grown, generator)


def _loss_ignores_padding(decoder: Decoder, generator: torch.Generator) -> None:
    vocab_size = decoder.spec.vocab_size
    hidden = torch.randn(9, decoder.spec.hidden_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab_size, (9,), generator=generator)
    head = decoder.head_weight.detach().double()
    padded, short = head.clone().requires_grad_(), head[:vocab_size].clone().requires_grad_()
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = cross_entropy_sum(ours, padded, labels, 4, vocab_size=vocab_size).total
    expected = cross_entropy(theirs @ short.T, labels, reduction="sum")
    torch.autograd.backward([loss, expected])
    assert padded.grad is not None and short.grad is not None and ours.grad is not None and theirs.grad is not None
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert (ours.grad - theirs.grad).abs().max() <= 1e-12
    assert (padded.grad[:vocab_size] - short.grad).abs().max() <= 1e-12
    assert not padded.grad[vocab_size:].any()


@pytest.mark.parametrize(("kind", "number"), [("tied", 1), ("untied", 63), ("sharded", 64), ("tied", 65), ("untied", 130)])
def test_a_grown_folder_is_what_transformers_makes_of_a_resized_model(
    sources: dict[str, Path], tmp_path: Path, kind: str, number: int
) -> None:
    """[D2] [D6] Same tensors and shapes; old rows, other tensors and the logits of old ids bit for bit; new rows are the mean
    to the noise that transformers adds to it (1e-9 of the covariance); config, tokenizer and index tell the truth."""
    source, out = sources[kind], tmp_path / "out"
    added = extend(
        source, out, vocabulary(special=["<|member|>"], ranges=[{"pattern": "<item_{}>", "count": number - 1}] * (number > 1))
    )
    assert added == {"tokens_added": number, "rows_described": 0, "rows_given": 0, "rows_mean": number}
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (out, source))
    before = theirs(TOKEN_IDS, use_cache=False).logits
    theirs.resize_token_embeddings(VOCAB_SIZE + number)
    assert ours.config.vocab_size == theirs.config.vocab_size == VOCAB_SIZE + number
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        is_vocabulary = tensor.shape[0] == VOCAB_SIZE + number
        assert tensor.shape == expected[name].shape
        assert torch.equal(
            tensor[:VOCAB_SIZE] if is_vocabulary else tensor, expected[name][:VOCAB_SIZE] if is_vocabulary else expected[name]
        )
        if is_vocabulary:
            assert (tensor[VOCAB_SIZE:] - expected[name][VOCAB_SIZE:]).abs().max() <= 2e-3
    assert torch.equal(ours(TOKEN_IDS, use_cache=False).logits[..., :VOCAB_SIZE], before)
    assert torch.equal(decoder_logits(load(out))[:, :VOCAB_SIZE], decoder_logits(load(source)))
    assert Tokenizer.load(out).vocab_size == len(AutoTokenizer.from_pretrained(out)) == VOCAB_SIZE + number
    if (out / "model.safetensors.index.json").is_file():
        totals = read_json(out / "model.safetensors.index.json")["metadata"]
        assert totals["total_size"] == sum(tensor.nbytes for tensor in all_tensors(out).values())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_has_the_rows_of_the_ids_and_no_others(tmp_path: Path, family: str, tied: bool) -> None:
    """[D2] [D6] Grown by 3, loaded with padding, written again: every tensor the same bits, `vocab_size` the ids."""
    extend(
        family_model(tmp_path / "source", family, tie_word_embeddings=tied),
        tmp_path / "grown",
        vocabulary(special=["<a>", "<b>", "<c>"]),
    )
    decoder = load(tmp_path / "grown")
    assert decoder.embed.weight.shape[0] == VOCAB_SIZE + 64
    (tmp_path / "out").mkdir()
    named = read_spec(tmp_path / "grown")[0].weight_map(decoder.spec).to_checkpoint(decoder.named_parameters())
    write_hf_folder(tmp_path / "out", named, tmp_path / "grown")
    before, after = all_tensors(tmp_path / "grown"), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(tmp_path / "out" / "config.json")["vocab_size"] == VOCAB_SIZE + 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trained", ["nothing", "adapters", "itself"])
@pytest.mark.parametrize("number", [0, 5])
@torch.no_grad()
def test_a_merged_model_is_the_adapted_one(tmp_path: Path, tied: bool, trained: str, number: int) -> None:
    """[D1] Grown or not, the head tied or not, embedding and head frozen, adapted or trained: transformers reads the merged
    export and gives the logits of the model with its adapters."""
    folder = tiny_model(tmp_path / "source", tie_word_embeddings=tied, dtype="float32")
    if number:
        extend(folder, tmp_path / "grown", vocabulary(ranges=[{"pattern": "<{}>", "count": number}]))
        folder = tmp_path / "grown"
    rows: tuple[Any, ...] = ("embed",) if tied else ("embed", "head")
    targets = ("q", "down", *(rows if trained == "adapters" else ()))
    decoder = with_adapters(folder, targets=targets, train_fully=rows if trained == "itself" else ())
    if trained == "itself":
        for name in rows:
            decoder.get_parameter(f"{name}.weight")[: VOCAB_SIZE + number] += 0.1 * torch.randn(VOCAB_SIZE + number, 64)
    (tmp_path / "out").mkdir()
    write_hf_folder(tmp_path / "out", full_tensors(decoder), folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(TOKEN_IDS, use_cache=False).logits[0]
    assert theirs.shape[-1] == VOCAB_SIZE + number
    assert (decoder_logits(decoder) - theirs).abs().max() <= 1e-5


def test_tokens_take_the_unused_rows_first(sources: dict[str, Path], tmp_path: Path) -> None:
    """An embedding of 434 rows for 384 ids: 50 tokens fit without growing, and only their rows change; 51 make it grow."""
    for number, rows in ((10, VOCAB_SIZE + 50), (50, VOCAB_SIZE + 50), (51, VOCAB_SIZE + 51)):
        out = tmp_path / str(number)
        extend(sources["unused rows"], out, vocabulary(ranges=[{"pattern": "<{}>", "count": number}]))
        before, after = all_tensors(sources["unused rows"]), all_tensors(out)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert after[name].shape[0] == rows == read_json(out / "config.json")["vocab_size"]
            assert torch.equal(after[name][:VOCAB_SIZE], before[name][:VOCAB_SIZE])
            assert torch.equal(after[name][VOCAB_SIZE + number :], before[name][VOCAB_SIZE + number :])
            mean = before[name][:VOCAB_SIZE].double().mean(0).to(torch.bfloat16)
            assert torch.equal(after[name][VOCAB_SIZE : VOCAB_SIZE + number], mean.expand(number, -1))


def test_rows_come_from_descriptions_and_from_vectors(sources: dict[str, Path], tmp_path: Path) -> None:
    """A description's row is the mean of its tokens' rows, in embedding and head alike; vectors are taken as they are, for the
    head only where the file has some; what has neither is the mean of all."""
    source, config = sources["untied"], {"special": ["<|member|>", "<|x|>"], "semantic": ["<a>", "<b>"]}
    words = Tokenizer.load(source).encode("the answer")
    assert len(words) > 1
    given = {"embed": torch.randn(2, 64), "head": torch.randn(2, 64)}
    before = all_tensors(source)
    for names in (("embed",), ("embed", "head")):
        path = tmp_path / f"{len(names)}.safetensors"
        save_file({name: given[name] for name in names}, path)
        settings = vocabulary(
            **config, descriptions={"<|member|>": "the answer"}, vectors=str(path), vectors_digest=file_sha256(path)
        )
        added = extend(source, tmp_path / f"out-{len(names)}", settings, path)
        assert added == {"tokens_added": 4, "rows_described": 1, "rows_given": 2, "rows_mean": 1}
        after = all_tensors(tmp_path / f"out-{len(names)}")
        for name, stored in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
            mean = before[stored].double().mean(0).float()
            assert torch.equal(after[stored][VOCAB_SIZE], before[stored][words].double().mean(0).float())
            assert torch.equal(after[stored][VOCAB_SIZE + 1], mean)
            assert torch.equal(after[stored][VOCAB_SIZE + 2 :], given[name] if name in names else mean.expand(2, -1))


def test_vectors_that_are_not_the_named_ones_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    tensors: dict[str, torch.Tensor]
    for tensors, words in (
        ({"head": torch.ones(2, 64)}, r"holds \['head'\]"),
        ({"embed": torch.ones(2, 64), "head": torch.ones(2, 64)}, "whose head is tied"),
        ({"embed": torch.ones(3, 64)}, r"expected floats \[2, 64\]"),
        ({"embed": torch.ones(2, 64, dtype=torch.int64)}, "expected floats"),
        ({"embed": torch.full((2, 64), float("nan"))}, "aren't finite"),
    ):
        save_file(tensors, path)
        (out := tmp_path / words[:8].replace("\\", "_")).mkdir(exist_ok=True)
        config = vocabulary(semantic=["<a>", "<b>"], vectors=str(path), vectors_digest=file_sha256(path))
        with pytest.raises(ModelError, match=words):
            extend_model(sources["tied"], config, out, vectors=path)
    for digest, words in (("", "has no vectors_digest; set vectors_digest: " + file_sha256(path)), ("0" * 64, "other bytes")):
        config = vocabulary(semantic=["<a>", "<b>"], vectors=str(path), vectors_digest=digest)
        with pytest.raises(ModelError, match=words):
            extend_model(sources["tied"], config, tmp_path, vectors=path)
    path.write_bytes(b"no safetensors")
    config = vocabulary(semantic=["<a>"], vectors=str(path), vectors_digest=file_sha256(path))
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        extend_model(sources["tied"], config, tmp_path, vectors=path)


def test_roles_reach_config_and_generation_config(sources: dict[str, Path], tmp_path: Path) -> None:
    """[D7] An added end and an added padding: their ids stand where generation looks for them."""
    extend(
        sources["tied"], tmp_path / "out", vocabulary(special=["<|pad|>", "<|end|>"], pad_token="<|pad|>", eos_token="<|end|>")
    )
    for name in ("config.json", "generation_config.json"):
        values = read_json(tmp_path / "out" / name)
        assert values["pad_token_id"] == VOCAB_SIZE and set(values["eos_token_id"]) == {2, VOCAB_SIZE + 1}


def test_a_prepared_model_is_an_artifact_and_takes_more_tokens_later(sources: dict[str, Path], tmp_path: Path) -> None:
    """[D10] The tokens are part of what the digest covers; an extended model is extended again; none are added twice."""
    source, first, second = sources["sharded"], vocabulary(semantic=["<a>"]), vocabulary(semantic=["<b>"])
    for name, folder, config in (("plain", source, vocabulary()), ("a", source, first), ("ab", tmp_path / "a", second)):
        with stage_artifact(tmp_path / name, "model") as staged:
            prepare_model(folder, config, staged)
    assert len({read_manifest(tmp_path / name).digest for name in ("plain", "a", "ab")}) == 3
    assert read_manifest(tmp_path / "a").counts["tokens_added"] == 1
    assert Tokenizer.load(tmp_path / "ab").encode_text("<a><b>") == [VOCAB_SIZE, VOCAB_SIZE + 1]
    shards = sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors"))
    linked = [name for name in shards if (tmp_path / "plain" / name).samefile(tmp_path / "ab" / name)]
    assert len(linked) == len(shards) - 2  # those of the embedding and the head were written anew
    with pytest.raises(TokenizerError, match="'<a>' is there already"), stage_artifact(tmp_path / "aa", "model") as staged:
        prepare_model(tmp_path / "a", first, staged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "ab", "plain"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ranges": [{"pattern": "<item>", "count": 3}]}, "must hold {} once"),
        ({"descriptions": {"<a>": "a"}}, "'<a>', which is no added token"),
        ({"special": ["<a>"], "vectors": "v.safetensors"}, "there are none"),
        ({"semantic": ["<a>"], "descriptions": {"<a>": "a"}, "vectors": "v"}, "has a description and a row of vectors"),
        ({"vectors_digest": "0" * 64}, "goes with vectors"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        vocabulary(**values)
