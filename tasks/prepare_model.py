"""A model folder of the user to a checked model, and the proof that we compute what transformers computes."""

from typing import TYPE_CHECKING

from flytekit import task

from tasks.artifacts import LogitReport, LogitReportFolder, ModelArtifact, ModelFolder
from tasks.cache import CACHED
from tasks.environments import CPU_IMAGE, MEDIUM, RETRIES, SHORT, TRAIN_IMAGE, retry_infrastructure
from tasks.lazy import lazy
from tasks.progress import bar
from tasks.sources import ModelSource

if TYPE_CHECKING:
    from lib.models import admit, verify
else:
    admit = lazy("lib.models.admit")
    verify = lazy("lib.models.verify")


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def prepare_model(source: ModelSource) -> ModelArtifact:
    """Take over config, tokenizer and safetensors of a Hugging Face folder after checking them."""
    model = ModelFolder.create()
    with model.write() as staged:
        staged.lineage["source"] = source.content_hash()
        admit.admit_model(source.open(), staged)
    return model


@task(cache=CACHED, container_image=TRAIN_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def verify_model(model: ModelArtifact) -> LogitReport:
    """Compare our decoder with transformers, on random models of the family and on this one."""
    report = LogitReportFolder.create()
    with report.write() as staged, bar("verify", "models") as shown:
        staged.lineage["model"] = model.digest
        verify.write_logit_report(verify.build_logit_report(model.open(), progress=shown.reach), model.digest, staged)
    return report
