"""A workflow's inputs file as the job that it asks for, every key and value checked, and the model's numbers."""

import importlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lib.config.base import Frozen, read_yaml
from lib.config.recipes import HeadsJob, SftJob, TrainJob
from lib.config.vocabulary import VocabularyConfig
from lib.core.errors import ConfigError, ModelError
from lib.models.hf_io import spec_of
from lib.models.mxfp4 import decoded_config
from lib.models.shapes import CONFIGS, spec_of_shape
from lib.models.spec import DecoderSpec
from lib.models.vocabulary import planned_rows
from lib.tokens.tokenizer import Tokenizer
from tasks.remote import is_remote

JOBS: dict[str, type[TrainJob]] = {"sft": SftJob, "heads": HeadsJob}
"""Workflow that trains -> what its inputs make."""
_JOB_INPUTS = ("learning_rate", "steps", "sequence_length", "nodes", "gpus_per_node", "config")


def read_job(path: Path, given: dict[str, Any]) -> tuple[Any, dict[str, Any], TrainJob]:
    """(workflow, its inputs, the job). A file belongs to the workflow that its folder is named after.

    Args:
        given: inputs that win over the file's.
    Raises:
        ConfigError: names the key, the value and what is expected.
    """
    name, values = path.resolve().parent.name, read_yaml(path) | given
    if name not in JOBS:
        raise ConfigError(f"{path}: its folder {name!r} names no workflow that trains; those are {', '.join(JOBS)}")
    workflow = getattr(importlib.import_module(f"workflows.{name}"), name)
    known = workflow.python_interface.inputs_with_defaults
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"{path}: {name} has no input {unknown[0]!r}; it has {', '.join(known)}")
    needed = {key for key, (kind, default) in known.items() if default is None and type(None) not in get_args(kind)}
    if missing := sorted(needed - values.keys()):
        raise ConfigError(f"{path}: {missing[0]} is missing; {name} can't run without")
    inputs = {key: default for key, (_, default) in known.items()} | values
    for key, (kind, _) in known.items():
        if inspect.isclass(kind) and issubclass(kind, Frozen) and key in values:
            inputs[key] = kind.parse(values[key], where=f"{path}: {key}")
    sizes = {key: inputs[key] for key in _JOB_INPUTS if key != "config"}
    job = JOBS[name].parse(sizes | {"config": values.get("config", {})}, where=str(path))
    return workflow, inputs | {key: getattr(job, key) for key in _JOB_INPUTS}, job


def read_numbers(job: TrainJob, model: str, shape: str | None, vocabulary: VocabularyConfig) -> DecoderSpec:
    """The decoder that the job trains, with its added tokens, from a model folder's config.json, and its tokenizer where it
    has one, or by the name of a published model.

    Raises:
        ModelError: there is no such folder, no such name, or the config isn't supported.
        TokenizerError: a token can't be added.
    """
    if shape is None and is_remote(model):
        raise ModelError(
            f"model {model} is not on this machine; give --shape, one of {', '.join(CONFIGS)}, or --model with a folder that "
            "holds its config.json"
        )
    folder = None if shape else Path(model)
    spec = spec_of_shape(shape) if shape else spec_of(decoded_config(Path(model)), Path(model))[1]
    if not vocabulary.is_empty:
        tokenizer = Tokenizer.load(folder) if folder and (folder / "tokenizer.json").is_file() else None
        spec = replace(spec, vocab_size=planned_rows(spec.vocab_size, vocabulary, tokenizer))
    return replace(spec, lm_head=job.config.outputs.lm is not None) if isinstance(job, HeadsJob) else spec
