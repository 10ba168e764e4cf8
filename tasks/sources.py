"""Flyte types of what users bring: raw data (a file or a folder of files) and a model folder."""

from typing import Annotated

from flytekit.extend import TypeEngine

from tasks.cli import install
from tasks.remote import is_remote, share_credentials
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


class ModelSourceFolder(Source):
    """A model folder in the Hugging Face layout."""

    what = "a Hugging Face model folder (config.json, tokenizer.json, *.safetensors)"
    folder_only = True


class VectorFile(Source):
    """Rows of added tokens; named in a configuration, which also has its digest."""

    what = "a safetensors file of vectors"


class TokenizerSourceFolder(Source):
    """A folder with a tokenizer, such as a model's; weights beside it stay where they are."""

    what = "a folder with a tokenizer (tokenizer.json, tokenizer_config.json)"
    folder_only = True
    left_behind = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


for _cls in (RawDataSource, ModelSourceFolder, TokenizerSourceFolder):
    TypeEngine.register(SourceTransformer(_cls))

RawData = Annotated[RawDataSource, hash_method(RawDataSource)]
ModelSource = Annotated[ModelSourceFolder, hash_method(ModelSourceFolder)]
TokenizerSource = TokenizerSourceFolder
"""Without a key of its content: what is cached takes the files that `find_tokenizer` made of it."""

install()
