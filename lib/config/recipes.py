"""The whole configuration of a recipe, and the job it becomes once the plain inputs are added."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from lib.config.base import Frozen, Number
from lib.config.data import DataConfig
from lib.config.evaluation import HeadsEvalJob
from lib.config.heads import HeadConfig, HeadsConfig
from lib.config.model import ModelConfig
from lib.config.optim import OptimConfig
from lib.config.parallel import ClusterConfig, ClusterShape, ParallelConfig
from lib.config.rows import RowsConfig
from lib.config.train import TrackingConfig, TrainConfig


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_NO_CONTEXT = (
    "and a row of tokens can't be split over ranks: attention would need keys and values of other ranks. Leave it out; for "
    "rows that don't fit, set model.activation_checkpointing, a smaller model.loss_chunk_tokens and "
    "train.rows_per_micro_batch: 1, or have several ranks compute each layer: parallel.tensor"
)


class RecipeConfig(Frozen):
    """What every training recipe is told, beside the knobs that are plain inputs of the workflow."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _can_be_cut(self) -> Self:
        """What no model can be; what the sizes of one say is asked where it is known (lib/parallel/plan.py)."""
        parallel, model = self.parallel, self.model
        if parallel.context != 1:
            raise ValueError(f"parallel.context is {parallel.context}, {_NO_CONTEXT}")
        asked = f"parallel.tensor is {parallel.tensor}"
        if parallel.tensor > 1 and parallel.expert > 1:
            raise ValueError(f"{asked} and expert is {parallel.expert}, and experts are either dealt out or cut; leave one out")
        if parallel.tensor > 1 and model.lora and model.lora.dropout:
            raise ValueError(f"{asked}, under which adapters have no dropout; set model.lora.dropout to 0, or leave it out")
        if parallel.tensor > 1 and model.compile != "none":
            raise ValueError(f"{asked}, under which layers are not compiled; leave out model.compile, or tensor")
        return self


class SftConfig(RecipeConfig):
    """Supervised fine-tuning."""


class HeadsRecipeConfig(RecipeConfig):
    """Training of named outputs, on rows with labels for them."""

    heads: Annotated[tuple[HeadConfig, ...], BeforeValidator(_as_tuple)] = Field(min_length=1, max_length=256)
    """What the model puts out, and how each output is trained."""

    @property
    def outputs(self) -> HeadsConfig:
        return HeadsConfig(heads=self.heads)

    def read_rows(self, rows: RowsConfig) -> RowsConfig:
        """How rows are read whose labels must fit the heads; the weights of their losses change nothing about that."""
        return rows.model_copy(update={"heads": tuple(head.model_copy(update={"weight": 1.0}) for head in self.heads)})

    @model_validator(mode="after")
    def _labels_are_of_whole_rows(self) -> "HeadsRecipeConfig":
        HeadsConfig(heads=self.heads)
        if self.data.long_rows in ("truncate", "split"):
            raise ValueError(
                f"data.long_rows is {self.data.long_rows!r}, but labels are of whole rows; set it to 'refuse' or 'drop'"
            )
        return self


class TrainJob(Frozen):
    """A complete, checked training job: a recipe's configuration and the workflow's plain inputs."""

    learning_rate: Number = Field(gt=0.0, le=1.0)
    """Peak of the schedule."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    sequence_length: int = Field(ge=8)
    """Tokens in a packed row."""
    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=0, le=16)
    """0 trains on CPU with `config.cluster.cpu_ranks_per_node` ranks."""
    config: RecipeConfig

    @property
    def shape(self) -> ClusterShape:
        cluster = self.config.cluster
        return ClusterShape(
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            ranks_per_node=self.gpus_per_node or cluster.cpu_ranks_per_node,
            threads_per_rank=cluster.threads_per_rank,
            accelerator=cluster.accelerator,
            interruptible=cluster.interruptible,
            shared_home=cluster.checkpoint_home is None,
        )

    @model_validator(mode="after")
    def _ranks_share_evenly(self) -> "TrainJob":
        config, data, train = self.config, self.config.data, self.config.train
        ranks = config.parallel.num_data_ranks(self.shape.num_ranks)
        kind = "ranks" if ranks == self.shape.num_ranks else "ranks with rows of their own"
        workers = max(1, data.workers)
        if data.num_streams % (ranks * workers):
            each = f" x {workers} data workers" if workers > 1 else ""
            raise ValueError(f"config.data.num_streams ({data.num_streams}) is not a multiple of the {ranks} {kind}{each}")
        if train.rows_per_step % (ranks * train.rows_per_micro_batch):
            raise ValueError(
                f"config.train.rows_per_step ({train.rows_per_step}) is not a multiple of {ranks} {kind} x "
                f"{train.rows_per_micro_batch} rows_per_micro_batch"
            )
        if self.sequence_length % config.parallel.tensor:
            asked = f"config.parallel.tensor ({config.parallel.tensor})"
            raise ValueError(f"sequence_length ({self.sequence_length}) is not a multiple of {asked}")
        if config.cluster.accelerator and not self.gpus_per_node:
            raise ValueError(f"config.cluster.accelerator is {config.cluster.accelerator}, but gpus_per_node is 0")
        if self.config.optim.warmup_steps >= self.steps:
            raise ValueError(f"config.optim.warmup_steps ({self.config.optim.warmup_steps}) is not below steps ({self.steps})")
        if train.profile and train.profile.last_step > self.steps:
            raise ValueError(f"config.train.profile ends with step {train.profile.last_step}, after the last of {self.steps}")
        return self

    @model_validator(mode="after")
    def _grouped_products_fit(self) -> "TrainJob":
        lora = self.config.model.lora
        if self.gpus_per_node and lora and "experts" in (lora.targets or ()) and lora.rank % 8:
            raise ValueError(
                f"config.model.lora.rank ({lora.rank}) is not a multiple of 8, which adapters of experts need on GPUs"
            )
        return self


class SftJob(TrainJob):
    """Of supervised fine-tuning."""

    config: SftConfig = Field(default_factory=SftConfig)


class HeadsJob(TrainJob):
    """Of training named outputs."""

    config: HeadsRecipeConfig

    @property
    def scoring(self) -> HeadsEvalJob:
        """What is scored, on as many ranks as train it."""
        config = self.config
        # Its ranks read the model that was trained from the shared home, wherever the checkpoints are.
        shape = self.shape.model_copy(update={"shared_home": True})
        return HeadsEvalJob(heads=config.heads, chat=config.data.chat, seed=config.train.seed, shape=shape)
