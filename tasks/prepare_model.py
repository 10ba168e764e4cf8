"""A model folder of the user, and the tokens it is to have, to a checked model; the proof that it computes what it should."""

from typing import TYPE_CHECKING

from flytekit import task

from lib.config.vocabulary import VocabularyConfig
from tasks.artifacts import LogitReport, LogitReportFolder, ModelArtifact, ModelFolder
from tasks.cache import CACHED
from tasks.environments import CPU_IMAGE, MEDIUM, RETRIES, SHORT, SMALL, TRAIN_IMAGE, retry_infrastructure
from tasks.lazy import lazy
from tasks.progress import bar
from tasks.sources import ModelSource, VectorFile

if TYPE_CHECKING:
    from lib.models import admit, logit_report, verify_fallback
else:
    admit = lazy("lib.models.admit")
    logit_report = lazy("lib.models.logit_report")
    verify_fallback = lazy("lib.models.verify_fallback")


@task(container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
@retry_infrastructure
def stamp_model(source: ModelSource) -> ModelSource:
    """The same address, keyed by what is there now. Not cached: a remote address that is an input is keyed by itself."""
    return source.stamped()


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def prepare_model(source: ModelSource, vocabulary: VocabularyConfig) -> ModelArtifact:
    """Take over config, tokenizer and safetensors of a Hugging Face folder after checking them, and add the tokens."""
    model = ModelFolder.create()
    with model.write() as staged:
        staged.lineage["source"] = source.content_hash()
        vectors = VectorFile(vocabulary.vectors).open() if vocabulary.vectors else None
        admit.prepare_model(source.open(), vocabulary, staged, vectors=vectors)
    return model


@task(cache=CACHED, container_image=TRAIN_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def verify_model(model: ModelArtifact) -> LogitReport:
    """Compare our decoder with transformers, on random models of the family and on this one."""
    report = LogitReportFolder.create()
    with report.write() as staged, bar("verify", "models") as shown:
        staged.lineage["model"] = model.digest
        found = verify_fallback.verify_folder(model.open(), progress=shown.reach)
        logit_report.write_logit_report(found, model.digest, staged)
    return report
