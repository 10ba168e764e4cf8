"""Rank 0's record of a run: metrics to one file, timings to another, both to the driver as an event."""

from pathlib import Path

from lib.cluster.group import Worker
from lib.models.flops import FlopCounter
from lib.train.meters import LOG_NAMES, METRICS_NAME, TIMINGS_NAME, SpeedMeter, StepLog, StepReport, report_row
from lib.train.step import StepCounts
from lib.train.times import StepTimes


class Journal:
    """Lines of steps up to `resume_step` stay, later ones of a start that was killed are cut."""

    def __init__(
        self, worker: Worker, run_dir: Path, *, steps: int, resume_step: int, steps_before: int, peak_flops: float
    ) -> None:
        """steps_before: done by another run, whose metrics are here and whose timings aren't.
        peak_flops: of all ranks together, per second."""
        self.logs = {name: run_dir / name for name in LOG_NAMES}
        """What a checkpoint takes in: name -> file."""
        self._worker, self._steps = worker, steps
        self._metrics = StepLog(self.logs[METRICS_NAME], resume_step=resume_step)
        self._timings = StepLog(self.logs[TIMINGS_NAME], resume_step=resume_step, steps_before=steps_before)
        self._meter = SpeedMeter(steps=steps, peak_flops=peak_flops)

    def step_done(self, report: StepReport, counter: FlopCounter, counts: StepCounts, times: StepTimes) -> None:
        """Write down a step that ended just now. The event is {"kind": "step", "steps", what report and meter say, and in
        "figures" the names of those that are the recipe's own}."""
        row = report_row(report)
        self._metrics.write(row)
        flops = counter.step(
            num_tokens=counts.num_tokens,
            num_attention_products=counts.num_attention_products,
            num_targets=counts.num_targets,
            num_documents=counts.num_documents,
        )
        speed = self._meter.step_done(step=report.step, num_tokens=report.num_tokens, flops=flops, times=times)
        self._timings.write({"step": report.step, **speed})
        del row["samples"]
        self._worker.emit({"kind": "step", "steps": self._steps, **row, **speed, "figures": list(report.figures)})
