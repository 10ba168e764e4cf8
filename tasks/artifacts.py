"""The artifacts that tasks hand to each other, as types of their signatures."""

from typing import Annotated

from flytekit import HashMethod
from flytekit.extend import TypeEngine

from tasks.artifact_type import Artifact, ArtifactTransformer, content_hash


class DatasetFolder(Artifact):
    """Checked examples of one kind, in Arrow files."""

    kind = "dataset"


class ModelFolder(Artifact):
    """A Hugging Face model folder: config, tokenizer, safetensors."""

    kind = "model"


class LogitReportFolder(Artifact):
    """The proof that our decoder computes what transformers computes with the same weights."""

    kind = "logit_report"


class CheckpointFolder(Artifact):
    """Trained weights as a Hugging Face folder under `hf/`, and the whole training state."""

    kind = "checkpoint"


class EvalReportFolder(Artifact):
    """Scores of a model on a data set, row by row."""

    kind = "eval_report"


class HeadsReportFolder(Artifact):
    """Scores of a model's output heads on a data set."""

    kind = "heads_report"


class ReportFolder(Artifact):
    """What a person reads after a run: `report.html` and `summary.json`."""

    kind = "report"


class QualityReportFolder(Artifact):
    """What was found in a data set: `quality.json`."""

    kind = "quality_report"


class TokenizerFolder(Artifact):
    """The files of a tokenizer and its chat template, as they came with a model."""

    kind = "tokenizer"


class TokenizedDatasetFolder(Artifact):
    """Token ids, loss masks and weights of a data set's rows, in Arrow files."""

    kind = "tokenized_dataset"


_CLASSES = (
    DatasetFolder,
    ModelFolder,
    LogitReportFolder,
    CheckpointFolder,
    EvalReportFolder,
    HeadsReportFolder,
    ReportFolder,
    QualityReportFolder,
    TokenizerFolder,
    TokenizedDatasetFolder,
)
for _cls in _CLASSES:
    TypeEngine.register(ArtifactTransformer(_cls))

_HASH = HashMethod(content_hash)
Dataset = Annotated[DatasetFolder, _HASH]
ModelArtifact = Annotated[ModelFolder, _HASH]
LogitReport = Annotated[LogitReportFolder, _HASH]
Checkpoint = Annotated[CheckpointFolder, _HASH]
EvalReport = Annotated[EvalReportFolder, _HASH]
HeadsReport = Annotated[HeadsReportFolder, _HASH]
Report = Annotated[ReportFolder, _HASH]
QualityReport = Annotated[QualityReportFolder, _HASH]
TokenizerFiles = Annotated[TokenizerFolder, _HASH]
TokenizedDataset = Annotated[TokenizedDatasetFolder, _HASH]

ARTIFACT_FORMATS = {f"postflyte-{cls.kind}": cls for cls in Artifact.__subclasses__()}
"""Blob format -> artifact class."""
