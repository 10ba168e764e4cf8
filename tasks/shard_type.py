"""The part of a source that one task ingests, as a Flyte type: keyed by its content, wherever it lies."""

from typing import Annotated

from flytekit import HashMethod

from lib.data.shard import SourceShard

Shard = Annotated[SourceShard, HashMethod(lambda shard: shard.digest)]
