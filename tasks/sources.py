"""Flyte types of what users bring: raw data (a file or a folder of files) and a model folder."""

from typing import Annotated

from flytekit.extend import TypeEngine

from tasks.cli import install
from tasks.remote import fingerprint, is_remote, share_credentials
from tasks.source_type import Source, SourceTransformer, hash_method


class RawDataSource(Source):
    """Rows to be ingested. At a remote address they are read where they lie; it may be a glob, or a data set of the Hub."""

    what = "a .jsonl (also .gz, .zst), .parquet or .arrow file, or a folder of them"

    def address(self) -> str:
        """Where the rows are, ready to be read."""
        if not is_remote(self.uri):
            return str(self.checked_path())
        share_credentials(self.uri)
        return self.uri

    def content_hash(self) -> str:
        """Sha256 over names and contents of the files here, or over a remote listing's names, sizes and checksums."""
        return self.fingerprint or fingerprint(self.uri) or super().content_hash()


class ModelSourceFolder(Source):
    """A model folder in the Hugging Face layout."""

    what = "a Hugging Face model folder (config.json, tokenizer.json, *.safetensors)"
    folder_only = True


class VectorFile(Source):
    """Rows of added tokens; named in a configuration, which also has its digest."""

    what = "a safetensors file of vectors"


for _cls in (RawDataSource, ModelSourceFolder):
    TypeEngine.register(SourceTransformer(_cls))

RawData = Annotated[RawDataSource, hash_method(RawDataSource)]
ModelSource = Annotated[ModelSourceFolder, hash_method(ModelSourceFolder)]

install()
