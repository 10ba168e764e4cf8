"""Training named outputs: numbers and labels of rows, by document or by token, beside or in place of the next token.

`HeadsWorker.train` is the algorithm, one rank's view; `run_heads` is the driver around it.
"""

import json
from pathlib import Path

import torch

from lib.cluster.group import GroupFactory, Worker, dispatch
from lib.config.heads import HeadsConfig
from lib.config.recipes import HeadsJob
from lib.core.artifact import Staged, read_manifest
from lib.core.errors import ConfigError, ModelError
from lib.core.manifest import Json
from lib.data.examples import labelled_kind
from lib.data.feed import ChatFeed
from lib.models.flops import FlopCounter
from lib.models.head_io import check_storable, matching_weights, read_heads
from lib.models.heads import headed_spec
from lib.models.hf_fallback import is_fallback
from lib.models.hf_io import read_spec
from lib.models.lora import num_trained
from lib.parallel.mesh import build_mesh
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from lib.train.handover import EXPORT, hand_over
from lib.train.heads import HeadsObjective, heads_micro_batch
from lib.train.lock import worker_lock
from lib.train.loop import begin, data_place, open_feed, run_steps
from lib.train.model_folder import WEIGHTS, export_dtype, load_heads_module, write_heads_module
from lib.train.optim import build_optimizer
from lib.train.run import RunInputs, run_training
from lib.train.step import Training
from lib.train.supervise import Progress

NAME = "heads"
NUM_PREVIEWS = 3


class HeadsWorker(Worker):
    """One rank."""

    @dispatch()
    def train(self, job_values: Json, place: Json) -> Json:
        """Train to the end, then export the weights; see `run_training` for what it takes and gives."""
        job = HeadsJob.parse(job_values, where="job")
        with worker_lock(Path(place["run_dir"])):
            return self._train(job, place)

    def _train(self, job: HeadsJob, place: Json) -> Json:
        config, heads, rows, model_dir = job.config, job.config.outputs, data_place(self, job), Path(place["model_dir"])
        begin(self, job, place)
        module = load_heads_module(
            config.model,
            heads,
            build_mesh(job.shape, config.parallel),
            model_dir,
            torch.device(self.info.device),
            seed=config.train.seed,
            fresh=not place["resume_step"],
        )
        flops = FlopCounter(module.headed.decoder.spec, config.model.lora, heads)
        optimizer, reduced = build_optimizer(module, config.optim), config.train.reduce_gradients
        training = Training(module, optimizer, HeadsObjective(heads), flops, reduced)
        encoder = ChatEncoder.of(Tokenizer.load(model_dir), config.data)
        size, pad_id, data_dir = job.sequence_length, encoder.tokenizer.pad_id, place["data_dir"]
        chats = ChatFeed(config.data, data_dir, str(model_dir), size, config.train.rows_per_step, labelled_kind(Path(data_dir)))
        producers = chats.producers(encoder, rank=rows.rank, num_ranks=rows.num_ranks)
        feed = open_feed(job, producers, lambda packed: heads_micro_batch(packed, size, pad_id, heads))
        run_steps(self, job, place, training, feed)
        out, dtype = Path(place["run_dir"]) / EXPORT, export_dtype(config.train)
        write_heads_module(module, encoder, out, dtype=dtype, rank=self.info.rank)
        hand_over(self, place)
        previews = chats.first_documents(encoder, NUM_PREVIEWS)
        labels = [json.loads(document.labels or "{}") for document in previews]
        return {"mask_preview_html": [encoder.preview_html(document.encoded()) for document in previews], "labels": labels}


def run_heads(job: HeadsJob, inputs: RunInputs, out: Staged, *, group_factory: GroupFactory, progress: Progress) -> None:
    """Train on conversations or completions with labels, and fill `out` as `run_training` does: with hf/, heads and all.

    Raises:
        ConfigError: the model can't have such heads, or lacks what LoRA shall adapt.
        ModelError: it, or the checkpoint that the run begins with, has a head that the job lacks or has for other outputs.
        DataError: the data set holds other examples.
        And what `run_training` raises.
    """
    num_weights = _num_trained(job, inputs.model_dir)
    if inputs.resume_from is not None:
        _check_same_heads(inputs.resume_from, job.config.outputs)
    kind = labelled_kind(inputs.data_dir)
    run_training(NAME, HeadsWorker, job, inputs, out, kind=kind, group_factory=group_factory, progress=progress)
    out.counts.update(trained_parameters=num_weights)
    out.meta.update(
        heads=[head.name for head in job.config.heads],
        adapter="PEFT knows no heads of ours; the merged weights hold everything" if job.config.model.lora else "none",
    )


def _num_trained(job: HeadsJob, model_dir: Path) -> int:
    """Numbers that are trained; refuses heads that the model can't have."""
    heads = job.config.outputs
    if is_fallback(model_dir):
        raise ConfigError(
            f"{model_dir}: its model_type is of no family here, and transformers' own code gives logits where heads need "
            "hidden states; train heads on a model of a family (docs/support-matrix.md)"
        )
    _, spec = read_spec(model_dir)
    if heads.lm is not None and not spec.lm_head:
        raise ConfigError(
            f"config.heads: {heads.lm.name!r} is of kind lm, but {model_dir} is a sequence classifier without an output matrix "
            "of the vocabulary; leave the head out"
        )
    check_storable(heads, model_dir)
    if saved := read_heads(model_dir):
        matching_weights(saved, heads, model_dir)
    of_heads = sum(head.num_outputs for head in heads.outputs) * spec.hidden_size
    return num_trained(headed_spec(spec, heads), job.config.model.lora) + of_heads


def _check_same_heads(checkpoint: Path, config: HeadsConfig) -> None:
    """Refuses a checkpoint of other heads, whose weights might fit all the same; `run_training` refuses what is none."""
    if read_manifest(checkpoint).kind != "checkpoint":
        return
    saved = read_heads(checkpoint / WEIGHTS)
    found, wanted = (
        {head.name: f"{head.definition} with {head.trained_by}" for head in heads}
        for heads in (saved.config.heads if saved else (), config.heads)
    )
    if other := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        name = other[0]
        raise ModelError(
            f"{checkpoint}: in resume_from the head {name!r} is {found.get(name, 'not there')}, in this run "
            f"{wanted.get(name, 'not there')}; give config.heads as they were, or begin with the earlier run's model as `model`"
        )
