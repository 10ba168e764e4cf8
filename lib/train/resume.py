"""A new run that goes on from the state of a finished one."""

from pathlib import Path

from lib.core.artifact import verify
from lib.core.errors import ConfigError, InfraError, ModelError
from lib.core.manifest import canonical_json
from lib.train.checkpoint import FACTS_NAME, KIND, read_facts, step_name
from lib.train.folder_shelf import StoredFolder
from lib.train.meters import METRICS_NAME, TIMINGS_NAME
from lib.train.shelf import Shelf

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
    facts = read_facts(StoredFolder(checkpoint / STATE))
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


def begin_from(checkpoint: Path, shelf: Shelf, identity: str, token: str) -> int:
    """Make the state of a checkpoint artifact the first checkpoint of a new run, with the metrics of its steps; its step.

    Args:
        token: of the start that has claimed the shelf.
    Raises:
        InfraError: it can't be written there.
    """
    state = checkpoint / STATE
    facts = read_facts(StoredFolder(state))
    draft = shelf.draft(step_name(facts["step"]), token)
    try:
        written = {path.name: draft.add(path.name, path) for path in sorted(state.iterdir()) if path.name != FACTS_NAME}
        written[FACTS_NAME] = draft.write(FACTS_NAME, [memoryview(canonical_json({**facts, "identity": identity}).encode())])
        written[METRICS_NAME] = draft.add(METRICS_NAME, checkpoint / METRICS_NAME)
        written[TIMINGS_NAME] = draft.write(TIMINGS_NAME, [])  # of the other run's machine
        draft.publish(KIND, written, meta={"step": facts["step"], "num_ranks": facts["num_ranks"]})
    except OSError as error:
        draft.discard()
        raise InfraError(f"{draft}: can't begin with {checkpoint}: {error}. {shelf.remedy} and run again") from error
    return int(facts["step"])
