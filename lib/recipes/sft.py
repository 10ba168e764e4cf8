"""Supervised fine-tuning: next-token cross-entropy on the assistant's tokens of packed conversations.

`SftWorker.train` is the algorithm, one rank's view; `run_sft` is the driver around it.
"""

from pathlib import Path

import torch

from lib.cluster.group import GroupFactory, Worker, dispatch
from lib.config.recipes import SftJob
from lib.core.artifact import Staged
from lib.core.manifest import Json
from lib.data.batch import collate
from lib.data.feed import ChatFeed
from lib.models.flops import FlopCounter
from lib.models.hf_fallback import is_fallback
from lib.models.hf_io import read_spec
from lib.models.lora import num_trained
from lib.models.peft_export import why_not_peft
from lib.parallel.mesh import build_mesh
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from lib.train.fallback import num_fallback_parameters
from lib.train.handover import EXPORT, hand_over
from lib.train.lock import worker_lock
from lib.train.loop import begin, data_place, open_feed, run_steps
from lib.train.model_folder import export_dtype, load_module, write_module
from lib.train.optim import build_optimizer
from lib.train.run import RunInputs, run_training
from lib.train.step import MicroBatch, NextToken, Training
from lib.train.supervise import Progress

NAME = "sft"
NUM_PREVIEWS = 3


class SftWorker(Worker):
    """One rank."""

    @dispatch()
    def train(self, job_values: Json, place: Json) -> Json:
        """Train to the end, then export the weights; see `run_training` for what it takes and gives."""
        job = SftJob.parse(job_values, where="job")
        with worker_lock(Path(place["run_dir"])):
            return self._train(job, place)

    def _train(self, job: SftJob, place: Json) -> Json:
        config, rows, model_dir = job.config, data_place(self, job), Path(place["model_dir"])
        begin(self, job, place)
        module = load_module(
            config.model,
            build_mesh(job.shape, config.parallel),
            model_dir,
            torch.device(self.info.device),
            seed=config.train.seed,
            fresh=not place["resume_step"],
        )
        flops = FlopCounter(module.decoder.spec, config.model.lora)
        optimizer, reduced = build_optimizer(module, config.optim), config.train.reduce_gradients
        training = Training(module, optimizer, NextToken(), flops, reduced)
        encoder = ChatEncoder.of(Tokenizer.load(model_dir), config.data)
        chats = ChatFeed(config.data, place["data_dir"], str(model_dir), job.sequence_length, config.train.rows_per_step)
        size, pad_id = job.sequence_length, encoder.tokenizer.pad_id
        producers = chats.producers(encoder, rank=rows.rank, num_ranks=rows.num_ranks)
        feed = open_feed(job, producers, lambda packed: MicroBatch.of(collate(packed, size, pad_id)))
        run_steps(self, job, place, training, feed)
        out, dtype = Path(place["run_dir"]) / EXPORT, export_dtype(config.train)
        write_module(module, config.model.lora, encoder, out, dtype=dtype, rank=self.info.rank)
        hand_over(self, place)
        previews = chats.first_documents(encoder, NUM_PREVIEWS)
        return {"mask_preview_html": [encoder.preview_html(document.encoded()) for document in previews]}


def run_sft(job: SftJob, inputs: RunInputs, out: Staged, *, group_factory: GroupFactory, progress: Progress) -> None:
    """Train on conversations and fill `out` as `run_training` does: with hf/, and adapter/ under LoRA, where PEFT can hold it
    (meta "adapter" says so, or why not).

    Raises:
        ConfigError: the model doesn't have what LoRA shall adapt.
        And what `run_training` raises.
    """
    num_trained, why_no_adapter = _trained(job, inputs.model_dir)
    run_training(NAME, SftWorker, job, inputs, out, kind="conversation", group_factory=group_factory, progress=progress)
    out.counts.update(trained_parameters=num_trained)
    out.meta.update(adapter=why_no_adapter or "peft" if job.config.model.lora else "none")


def _trained(job: SftJob, model_dir: Path) -> tuple[int, str | None]:
    """(numbers that are trained, why their adapters can't be written for PEFT); refuses what the model doesn't have."""
    lora = job.config.model.lora
    if is_fallback(model_dir):
        return num_fallback_parameters(model_dir, lora), None
    _, spec = read_spec(model_dir)
    return num_trained(spec, lora), why_not_peft(lora, spec) if lora else None
