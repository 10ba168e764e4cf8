"""What a training job will take, before anything runs: from its configuration and the model's numbers, without a weight."""

from dataclasses import asdict, dataclass

from lib.config.recipes import TrainJob
from lib.core.manifest import Json
from lib.models.lora import num_trained
from lib.models.spec import DecoderSpec
from lib.parallel.devices import Device
from lib.parallel.memory_model import HEAP_FACTOR, BatchShape, MemoryEstimate, decoder_units, estimate_memory
from lib.parallel.time_model import Machines, StepEstimate, estimate_step

SAVED_BYTES = 12
"""Weight and two moments of each trained number: what a save copies to the host."""
HEADROOM = 0.9
"""Of a device's memory that a step should need at most: fragments, kernels' workspaces and libraries take the rest."""


@dataclass(frozen=True)
class Forecast:
    """Of a job on a kind of machine."""

    mesh: dict[str, int]
    """Axis -> ranks."""
    parameters: int
    trained_parameters: int
    batch: BatchShape
    tokens: int
    """Slots of all steps: what the job trains on, if rows are full."""
    memory: MemoryEstimate
    """Of a rank."""
    saved_bytes: float
    """Of host memory, while a rank's checkpoint is being written."""
    room_bytes: float
    """Of memory that a rank has."""
    step: StepEstimate
    steps: int
    num_ranks: int
    device: Device

    @property
    def needed_bytes(self) -> float:
        """On CPU, what is being saved lies beside what is being trained, in a heap with holes."""
        return self.memory.total if self.device.is_gpu else HEAP_FACTOR * self.memory.total + self.saved_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= HEADROOM * self.room_bytes

    def to_json(self) -> Json:
        step = {"flops": self.step.flops, "seconds": self.step.seconds, "mfu": self.step.mfu(self.num_ranks, self.device)}
        step |= {"tokens_per_second": self.step.tokens_per_second, "exposed_seconds": self.step.exposed_seconds}
        return {
            "mesh": self.mesh,
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "tokens": self.tokens,
            "flops": self.step.flops * self.steps,
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total, "saved": self.saved_bytes},
            "room_bytes": self.room_bytes,
            "fits": self.fits,
            "step": step,
            "seconds": self.step.seconds * self.steps,
        }


def forecast(
    job: TrainJob, spec: DecoderSpec, device: Device, *, room_bytes: float, efficiency: float, target_share: float = 1.0
) -> Forecast:
    """What `job` takes on a machine of such devices.

    Args:
        room_bytes: memory of a rank.
        efficiency: share of the device's peak that products reach.
        target_share: of the tokens that are trained; all where nobody knows.
    """
    shape, config = job.shape, job.config
    sizes = config.parallel.sizes(shape.num_ranks)
    train, data_ranks = config.train, config.parallel.num_data_ranks(shape.num_ranks)
    batch = BatchShape(
        rows=train.rows_per_micro_batch,
        sequence_length=job.sequence_length,
        micro_batches=train.rows_per_step // (train.rows_per_micro_batch * data_ranks),
        reduced=train.reduce_gradients,
        target_share=target_share,
    )
    machines = Machines(device, per_node=shape.ranks_per_node)
    units = decoder_units(spec, config.model.lora, sizes["tensor"], sizes["expert"])
    return Forecast(
        mesh=sizes,
        parameters=spec.num_parameters,
        trained_parameters=num_trained(spec, config.model.lora),
        batch=batch,
        tokens=train.rows_per_step * job.sequence_length * job.steps,
        memory=estimate_memory(spec, config.model, sizes, batch, on_gpu=device.is_gpu),
        saved_bytes=SAVED_BYTES * sum(unit.pieces(sizes)[0] for unit in units.values()),
        room_bytes=room_bytes,
        step=estimate_step(spec, config.model, sizes, batch, machines=machines, efficiency=efficiency),
        steps=job.steps,
        num_ranks=shape.num_ranks,
        device=device,
    )
