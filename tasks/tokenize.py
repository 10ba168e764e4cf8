"""Data sets tokenised once, for corpora that are used again. Streaming without this stage gives the same batches."""

from typing import TYPE_CHECKING

from flytekit import task

from lib.config.chat import ChatConfig
from tasks.artifacts import (
    Dataset,
    ModelArtifact,
    TokenizedDataset,
    TokenizedDatasetFolder,
    TokenizerFiles,
    TokenizerFolder,
)
from tasks.cache import CACHED
from tasks.environments import CPU_IMAGE, MEDIUM, RETRIES, SHORT, SMALL, retry_infrastructure
from tasks.lazy import lazy
from tasks.progress import bar
from tasks.sources import TokenizerSource

if TYPE_CHECKING:
    from lib.data import tokenize as tokenizing
else:
    tokenizing = lazy("lib.data.tokenize")


@task(container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
@retry_infrastructure
def find_tokenizer(source: TokenizerSource) -> TokenizerFiles:
    """A tokenizer's files by their content. Not cached: what is there now is what counts."""
    files = TokenizerFolder.create()
    with files.write() as staged:
        tokenizing.copy_tokenizer(source.open(), staged)
    return files


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def take_tokenizer(model: ModelArtifact) -> TokenizerFiles:
    """A model's tokenizer alone, so that what is tokenised doesn't depend on weights."""
    files = TokenizerFolder.create()
    with files.write() as staged:
        staged.lineage["model"] = model.digest
        tokenizing.copy_tokenizer(model.open(), staged)
    return files


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def tokenize(data: Dataset, tokenizer: TokenizerFiles, config: ChatConfig) -> TokenizedDataset:
    """Token ids, masks and weights of every conversation."""
    tokens = TokenizedDatasetFolder.create()
    with tokens.write() as staged, bar("tokenize", "rows") as shown:
        staged.lineage.update(data=data.digest, tokenizer=tokenizer.digest)
        tokenizing.tokenize_conversations(data.open(), tokenizer.open(), config, staged, progress=shown.add)
    return tokens
