"""Every error this project raises on purpose.

Two roots decide what happens next. A `UserError` is wrong input: it says what, which value, where, and what to do;
it is never retried. An `InfraError` is the machine's fault (a dead worker, a damaged file, a deadline): it is
retried, and never turned into a number.
"""

NO_REMOTE_CODE = (
    "asks to run code from the folder (auto_map), which never runs here: no setting allows it, there is no trust_remote_code. "
    "If transformers has this model itself, delete auto_map from the file; else add a family, see docs/add-a-model.md"
)
"""Follows the name of a file."""


class PostflyteError(Exception):
    """Root of all errors raised on purpose."""


class UserError(PostflyteError):
    """Wrong input. The message names the value, the place and the remedy."""


class ConfigError(UserError):
    """A configuration value is unknown, of the wrong type, out of bounds, or contradicts another."""


class DataError(UserError):
    """A data file or row can't be used. The message starts with `path:line:` where a row is to blame."""


class ModelError(UserError):
    """A model folder or a weight in it can't be used."""


class TokenizerError(UserError):
    """A tokenizer or chat template can't be used."""


class NonFiniteLossError(UserError):
    """The loss or the gradient norm stopped being finite. The message names step and sample ids."""


class RunInUseError(UserError):
    """Another live process trains in the same run folder."""


class InfraError(PostflyteError):
    """The machine failed, not the input; a retry may succeed."""


class ArtifactCorruptError(InfraError):
    """A file of an artifact is missing, altered, or not covered by its manifest."""


class WorkerDiedError(InfraError):
    """A worker of a group died, stopped answering, or missed a deadline. The message names rank and cause."""


class PreemptedError(InfraError):
    """The machine is about to be taken away: SIGTERM came. The message says what was saved before."""


class GenerationError(InfraError):
    """The inference engine failed to answer; never scored as a wrong answer."""
