"""A forecast as text for people."""

from lib.config.recipes import TrainJob
from lib.parallel.devices import GIB
from lib.train.forecast import HEADROOM, Forecast


def describe(found: Forecast, job: TrainJob, tasks: list[list[str]]) -> str:
    """Sections under their names; the verdict last."""
    memory, step, batch = found.memory, found.step, found.batch
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1) or "alone"
    parts = ", ".join(f"{name.replace('_', ' ')} {value / GIB:.2f}" for name, value in vars(memory).items() if value)
    hours, minutes = divmod(round(step.seconds * found.steps / 60), 60)
    mfu = step.mfu(found.num_ranks, found.device)
    rows, length = job.config.train.rows_per_step, job.sequence_length
    summed = ", gradients summed up in each" if batch.micro_batches > 1 and batch.reduced == "each_micro_batch" else ""
    lines = {
        "ranks": f"{job.nodes} node(s) x {job.shape.ranks_per_node} {found.device.name} rank(s): {mesh}",
        "model": f"{found.parameters / 1e9:.3f} B parameters, {found.trained_parameters / 1e9:.3f} B trained",
        "step": f"{rows} rows of {length} tokens: {batch.micro_batches} micro-batch(es) of {batch.rows} on each rank{summed}",
        "job": f"{found.steps:,} steps, at most {found.tokens:,} tokens, {step.flops * found.steps:.3g} FLOPs",
        "memory": f"{memory.total / GIB:.2f} GiB of a rank's {found.room_bytes / GIB:.1f}: {parts}",
        "saving": f"{found.saved_bytes / GIB:.2f} GiB of host memory for each rank while a checkpoint is written",
        "time": f"{step.seconds:.3g} s a step, {step.exposed_seconds:.2g} s of it transfers; {step.tokens_per_second:,.0f} "
        f"tokens/s, MFU {mfu:.0%}, {hours} h {minutes} min in all: a prediction",
    }
    text = "".join(f"{name:8}{value}\n" for name, value in lines.items())
    if tasks:
        width = max(len(name) for name, _ in tasks)
        text += "tasks\n" + "".join(f"  {name:{width}}  {state}\n" for name, state in tasks)
    return text + ("" if found.fits else _advice(found))


def _advice(found: Forecast) -> str:
    memory = found.memory
    kept = {
        "parameters, optimizer and gradients": memory.parameters + memory.optimizer + memory.gradients,
        "activations": memory.activations + memory.working,
        "logits": memory.logits,
    }
    are_whole = found.batch.micro_batches > 1 and found.batch.reduced == "each_step"
    sooner = "config.train.reduce_gradients: each_micro_batch, " if are_whole else ""
    remedy = {
        "parameters, optimizer and gradients": f"{sooner}more ranks or config.model.lora",
        "activations": "config.model.activation_checkpointing, fewer rows_per_micro_batch or a shorter sequence_length",
        "logits": "a smaller config.model.loss_chunk_tokens",
    }
    most = max(kept, key=lambda name: kept[name])
    return (
        f"DOES NOT FIT: {found.needed_bytes / GIB:.2f} GiB are above {HEADROOM:.0%} of {found.room_bytes / GIB:.1f}. The most "
        f"is taken by {most} ({kept[most] / GIB:.2f} GiB): {remedy[most]} would help\n"
    )
