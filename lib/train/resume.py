"""A new run that goes on from the state of a finished one."""

import os
import shutil
from pathlib import Path

from lib.core.artifact import link_or_copy, stage_artifact, verify
from lib.core.errors import ConfigError, ModelError
from lib.core.manifest import canonical_json
from lib.train.checkpoint import FACTS_NAME, KIND, checkpoint_folder, read_facts
from lib.train.meters import METRICS_NAME
from lib.train.supervise import CHECKPOINTS

STATE = "state"
"""Folder of a checkpoint artifact that holds its training state."""


def steps_before(checkpoint: Path | None, *, steps: int, model_digest: str) -> int:
    """Steps that a run of `steps` steps has behind it when it begins; 0 without a checkpoint.

    Args:
        checkpoint: artifact of kind "checkpoint".
    Raises:
        ArtifactCorruptError: it isn't one, or not as it was written.
        ConfigError: there is nothing left to train.
        ModelError: it was trained from another model.
    """
    if checkpoint is None:
        return 0
    verify(checkpoint, "checkpoint")
    facts = read_facts(checkpoint / STATE)
    if facts["model"] != model_digest:
        raise ModelError(
            f"{checkpoint}: resume_from was trained from model {facts['model'][:12]}, this run's is {model_digest[:12]}; give "
            "this run the same model"
        )
    if facts["step"] >= steps:
        raise ConfigError(
            f"{checkpoint}: resume_from has {facts['step']} steps behind it and the run ends after {steps}; raise steps"
        )
    return int(facts["step"])


def begin_from(checkpoint: Path, run_dir: Path, identity: str) -> int:
    """Make the state of a checkpoint artifact the first checkpoint of a new run, with the metrics of its steps; its step.

    A kill in between leaves nothing that the next call minds.
    """
    facts = read_facts(checkpoint / STATE)
    fresh = run_dir / f".{METRICS_NAME}.begun"
    shutil.copyfile(checkpoint / METRICS_NAME, fresh)
    os.replace(fresh, run_dir / METRICS_NAME)
    with stage_artifact(checkpoint_folder(run_dir / CHECKPOINTS, facts["step"]), KIND) as staged:
        for path in sorted((checkpoint / STATE).iterdir()):
            if path.name != FACTS_NAME:
                link_or_copy(path, staged.path / path.name)
        (staged.path / FACTS_NAME).write_text(canonical_json({**facts, "identity": identity}), encoding="utf-8")
        staged.meta.update(step=facts["step"], num_ranks=facts["num_ranks"])
    return int(facts["step"])
