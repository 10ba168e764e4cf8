"""What a logit report says: each model that was compared, the limits, and whether the model may be trained."""

from pathlib import Path
from typing import Literal, Self

from lib.config.base import Frozen
from lib.core.artifact import Staged
from lib.core.errors import ArtifactCorruptError, ConfigError

REPORT_FILE = "logit_report.json"
LOGIT_LIMIT = 1e-5
"""Greatest difference of a logit: absolute for random models, whose logits are of size 1, and relative to the greatest
|logit| for a checkpoint."""
GRAD_LIMIT = 1e-5
"""Greatest difference of a gradient, in units of the greatest |gradient| of its tensor, or of SMALL_GRADIENT where that is
greater."""
SMALL_GRADIENT = 0.05
"""Of the model's greatest |gradient|. What should be exactly zero, as for queries that see one key only, may be rounding."""
OWN_DTYPE_LIMIT = 2.0
"""How much worse than transformers' may our rounding be in the dtype of the checkpoint."""


class Divergence(Frozen):
    """Where ours and the reference part: the first tensor, in the order of computation, of one document alone."""

    module: str = ""
    """Ours; empty where no activation differs."""
    side: Literal["", "input", "output"] = ""
    """Of the module."""
    reference_module: str = ""
    """That of transformers which holds the same weights."""
    size: float = 0.0
    """Greatest difference, in units of the greatest |value| of the reference."""
    gradient: str = ""
    """Parameter whose gradient differs most; empty where gradients were not compared."""

    def __str__(self) -> str:
        where = f"{self.side} of {self.module} (transformers: {self.reference_module}) is the first to differ"
        found = f"{where}, by {self.size:.2g} of its size" if self.module else "no activation differs for a document alone"
        return f"{found}; of the gradients that of {self.gradient} differs most" if self.gradient else found


class CaseResult(Frozen):
    """One model compared with transformers."""

    model: str
    """What was drawn, in words."""
    max_logit: float
    """Greatest |logit| of the reference; of a sequence classifier, here and below, the last hidden states stand for logits."""
    logit_limit: float
    """What the next two may be at most."""
    logit_diff: float
    """Ours, packed and alone, against the reference: greatest difference."""
    packed_diff: float
    """Ours packed against ours alone: greatest difference."""
    grad_diff: float | None
    """Greatest relative difference of a gradient; None where no gradients were compared."""
    leaked: int
    """Logits that changed, in any bit, when all tokens of another document were changed; must be 0."""
    own_dtype_error: float = 0.0
    """Ours in the checkpoint's own dtype against the reference in float32, in units of what the reference in that dtype is
    off by; 0 where the dtype is float32 or was not compared."""
    first_difference: Divergence | None = None
    """None where nothing is over its limit."""

    def problems(self) -> list[str]:
        found = []
        for name, value, bound in (
            ("logits differ", self.logit_diff, self.logit_limit),
            ("packing changes logits", self.packed_diff, self.logit_limit),
            ("gradients differ", self.grad_diff or 0.0, GRAD_LIMIT),
            ("documents see each other in", float(self.leaked), 0.0),
            ("rounding in its own dtype, against transformers'", self.own_dtype_error, OWN_DTYPE_LIMIT),
        ):
            if not value <= bound:  # also true for NaN
                where = f"; {self.first_difference}" if self.first_difference else ""
                found.append(f"{self.model}: {name} {value:.3g} > {bound:.3g}{where}")
        return found


class LogitReport(Frozen):
    """Admission of a model: `passed` is false when any comparison is over its limit."""

    family: str
    seed: int
    num_configs: int
    max_logit_diff: float
    """Over the random models, as are the next two."""
    max_grad_diff: float
    packed_diff: float
    cases: list[CaseResult]
    checkpoint: CaseResult
    """The weights of the folder itself."""
    limits: dict[str, float]
    problems: list[str]
    passed: bool
    packing_problem: str = ""
    """Why several documents in a row are not proven to be as alone; empty where they are."""
    adapter_problem: str = ""
    """Why adapters can't be trained beside its weights; empty where random ones give the logits of the merged weights."""
    model_digest: str = ""
    """Digest of the model artifact that was compared; filled in by who knows it."""

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Self:
        """Raises ArtifactCorruptError for anything but a report."""
        try:
            return cls.model_validate_json(text)
        except (ConfigError, ValueError) as error:
            raise ArtifactCorruptError(f"{where}: not a logit report; make it again: {error}") from error


def write_logit_report(report: LogitReport, model_digest: str, staged: Staged) -> None:
    """Fill an artifact with a report about the model of this digest."""
    named = report.model_copy(update={"model_digest": model_digest})
    (staged.path / REPORT_FILE).write_text(named.to_json() + "\n", encoding="utf-8")
    staged.counts.update(configs=report.num_configs, problems=len(report.problems))
    staged.meta.update(passed=report.passed, model=model_digest)


def read_logit_report(folder: Path) -> LogitReport:
    """The report of an artifact; ArtifactCorruptError if there is none."""
    path = folder / REPORT_FILE
    if not path.is_file():
        raise ArtifactCorruptError(f"{path}: no such file; make the logit report again")
    return LogitReport.from_json(path.read_text(encoding="utf-8"), where=str(path))
