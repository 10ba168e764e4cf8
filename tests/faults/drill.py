"""Kill the real train task at random moments and see that it ends in the same bits.

A trial runs `pyflyte run tasks/train.py train …` (Flyte, Ray, two ranks, checkpoints) in a home of its own and, at a random
moment between the first and the last step of the undisturbed run, sends SIGKILL to
- one rank: the driver starts the ranks again, the same command ends well;
- the node process of its Ray: the driver starts another Ray and the ranks;
- the driver alone: the command is run again and goes on from the last checkpoint;
- the driver and every process below it (a machine that loses power): likewise;
or SIGTERM to the driver, which saves and ends with an error; the command is run again.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lib.core.artifact import read_manifest, stage_artifact
from lib.core.manifest import Manifest, digest_of
from lib.core.paths import safe_name
from lib.data.rows import ingest_dataset
from lib.models.admit import admit_model
from lib.models.logit_report import write_logit_report
from lib.models.verify import build_logit_report
from lib.train.checkpoint import published_steps
from lib.train.folder_shelf import FolderShelf
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
VICTIMS = ("rank", "driver", "machine", "node", "warned")
RANK_NAME, NODE_NAME = "ray::_RankActor", "raylet"
DEADLINE_SECONDS = 300.0
JOB: dict[str, Any] = {
    "learning_rate": 1e-3,
    "steps": 120,
    "sequence_length": 128,
    "nodes": 1,
    "gpus_per_node": 0,
    "config": {
        "data": {"num_streams": 4, "open_packs": 4},
        "train": {"rows_per_step": 4, "rows_per_micro_batch": 1, "checkpoint_every": 10},
        "tracking": {"mlflow": False},
    },
}


@dataclass
class Trial:
    """What one trial did and how it ended."""

    victim: str
    moment: float
    """Fraction of the way from the first to the last step at which the kill was sent."""
    killed_at_step: int = -1
    runs: int = 0
    """Times the command was started."""
    restarts: int = 0
    """Times its last start had to start the ranks again: none where they ended before anybody noticed."""
    saved_step: int = -1
    """Of the newest checkpoint, once the process that was hit, or warned, had ended."""
    same_bits: bool = False
    seconds: float = 0.0
    problem: str = ""


@dataclass
class Inputs:
    """Artifacts that every trial trains on."""

    model: Path
    data: Path
    report: Path

    @staticmethod
    def make(root: Path) -> "Inputs":
        """A tiny random model and 400 short conversations, through the product's own gates."""
        rows = root / "rows.jsonl"
        rng = random.Random(5)
        with rows.open("w", encoding="utf-8") as stream:
            for number in range(400):
                left, right = rng.randrange(10, 100), rng.randrange(10, 100)
                turns = [("user", f"What is {left} + {right}?"), ("assistant", f"The answer is {left + right}.")]
                messages = [{"role": role, "content": content} for role, content in turns]
                stream.write(json.dumps({"id": f"sum-{number}", "messages": messages}) + "\n")
        with stage_artifact(root / "data", "dataset") as staged:
            ingest_dataset(rows, staged)
        with stage_artifact(root / "model", "model") as staged:
            admit_model(tiny_model(root / "hf", num_hidden_layers=4), staged)
        with stage_artifact(root / "report", "logit_report") as staged:
            proof = build_logit_report(root / "model", num_configs=2)
            write_logit_report(proof, read_manifest(root / "model").digest, staged)
        return Inputs(root / "model", root / "data", root / "report")


@dataclass
class Run:
    """One start of the command in a home, with what is needed to watch and kill it."""

    inputs: Inputs
    home: Path
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        pyflyte = Path(sys.executable).with_name("pyflyte")
        command = [str(pyflyte), "-c", "flyte.config", "run", "tasks/train.py", "train"]
        command += ["--model", str(self.inputs.model), "--data", str(self.inputs.data), "--report", str(self.inputs.report)]
        command += ["--job", json.dumps(JOB)]
        environment = os.environ | {"POSTFLYTE_HOME": str(self.home), "FLYTE_LOCAL_CACHE_ENABLED": "false"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def steps_done(self) -> int:
        """Lines of the run folder's metrics.jsonl."""
        return sum(path.read_bytes().count(b"\n") for path in self.home.glob("runs/*/metrics.jsonl"))

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.steps_done() < step and self.process.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} was not reached in {DEADLINE_SECONDS:.0f} s; see {self.log}")
            time.sleep(0.01)

    def kill(self, victim: str, rng: random.Random) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [child for child in below if " ".join(child.cmdline()).startswith(RANK_NAME)]
        nodes = [child for child in below if child.name() == NODE_NAME]
        targets = {"rank": [rng.choice(ranks)] if ranks else [], "node": nodes, "machine": below}.get(victim, [])
        if victim == "warned":
            self.process.send_signal(signal.SIGTERM)
        if victim in ("driver", "machine"):
            self.process.send_signal(signal.SIGKILL)
        for target in targets:
            try:
                target.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue

    def wait(self) -> int:
        return self.process.wait(timeout=DEADLINE_SECONDS)


def newest_step(home: Path) -> int:
    """Of the checkpoints in a home; 0 before the first."""
    folders = home.glob("runs/*/checkpoints")
    return max((step for folder in folders for step in published_steps(FolderShelf(folder))), default=0)


def result_of(home: Path) -> Manifest:
    """Of the one checkpoint artifact in a home."""
    (folder,) = (home / "artifacts" / "checkpoint").iterdir()
    return read_manifest(folder)


def weights_digest(manifest: Manifest) -> str:
    """Digest of weights, moments and everything else of a checkpoint."""
    return digest_of({"weights": manifest.meta["weights_digest"], "checkpoint": manifest.digest})


def run_drill(
    root: Path, num_trials: int, *, seed: int, kind: str = "task", victims: tuple[str, ...] = VICTIMS
) -> dict[str, Any]:
    """Returns the figures that `python -m tests.faults` prints, with a line a trial on stderr. Of those that were warned they
    say how many had the step under way saved before they ended.

    Args:
        kind: what it is called there.
        victims: which, in turn.
    """
    rng = random.Random(seed)
    inputs = Inputs.make(root)
    undisturbed = Run(inputs, root / "undisturbed", root / "undisturbed.log")
    undisturbed.wait_for_step(1)
    if undisturbed.wait():
        raise RuntimeError(f"the undisturbed run failed:\n{undisturbed.log.read_text()[-4000:]}")
    expected = weights_digest(result_of(undisturbed.home))
    trials = []
    for number in range(num_trials):
        trial = Trial(victims[number % len(victims)], rng.random())
        run_trial(inputs, root / safe_name(f"trial-{number:03d}", what="trial"), trial, expected, rng)
        print(f"trial {number + 1}/{num_trials}: {asdict(trial)}", file=sys.stderr, flush=True)
        trials.append(trial)
    warned = [trial for trial in trials if trial.victim == "warned"]
    return {
        "kind": kind,
        "trials": num_trials,
        "survived": sum(trial.same_bits for trial in trials),
        "kills": sum(trial.killed_at_step >= 0 for trial in trials),
        "hangs": sum("Timeout" in trial.problem for trial in trials),
        "leaks": num_leaked(root),
        "restarts": sum(trial.restarts for trial in trials),
        "warned": len(warned),
        "warned_and_saved": sum(trial.saved_step >= trial.killed_at_step >= 0 for trial in warned),
        "details": {"seed": seed, "digest": expected, "trials": [asdict(trial) for trial in trials]},
    }


def run_trial(inputs: Inputs, home: Path, trial: Trial, expected: str, rng: random.Random) -> None:
    started = time.monotonic()
    log = home.with_suffix(".log")
    try:
        run = Run(inputs, home, log)
        run.wait_for_step(max(1, int(trial.moment * JOB["steps"])))
        time.sleep(rng.random() * 0.1)
        trial.killed_at_step = run.steps_done()
        run.kill(trial.victim, rng)
        code, trial.runs = run.wait(), 1
        trial.saved_step = newest_step(home)
        while code and trial.runs < 3:
            code = Run(inputs, home, log).wait()
            trial.runs += 1
        if code == 0:
            result = result_of(home)
            trial.same_bits, trial.restarts = weights_digest(result) == expected, result.info["restarts"]
        trial.problem = "" if trial.same_bits else f"exit code {code}; see {log}"
    except (TimeoutError, subprocess.TimeoutExpired, psutil.Error) as error:
        trial.problem = f"{type(error).__name__}: {error}"
    trial.seconds = round(time.monotonic() - started, 1)


def num_leaked(root: Path, grace_seconds: float = 30.0) -> int:
    """Processes that still know a home of the drill after a grace period."""
    deadline = time.monotonic() + grace_seconds
    while leaked := _processes_of(root):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return len(leaked)


def _processes_of(root: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("POSTFLYTE_HOME", "").startswith(f"{root}/"):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
