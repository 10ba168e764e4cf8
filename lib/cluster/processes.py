"""Facts about processes of this machine, and ending them."""

import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

_CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")


def end_trees(identities: Iterable[tuple[int, float]], wait_seconds: float = 10.0) -> None:
    """SIGKILL processes and their descendants, stopped ones too, and wait until they are gone.

    identities: (pid, creation time); a pid that another process has taken since is left alone.
    """
    doomed: list[psutil.Process] = []
    for pid, created in identities:
        try:
            process = psutil.Process(pid)
            if process.create_time() == created:
                doomed += [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    for process in doomed:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(doomed, timeout=wait_seconds)


def oom_kills() -> int:
    """How many processes the kernel has killed in this control group for want of memory; 0 where it can't be told."""
    try:
        lines = _CGROUP_EVENTS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def exit_cause(exit_code: int | None, new_oom_kills: int) -> str:
    """Why a process ended, in words."""
    if new_oom_kills > 0:
        return (
            f"out of memory: the kernel killed {new_oom_kills} process(es) here; lower the memory need or take a larger machine"
        )
    if exit_code is None:
        return "its process is gone"
    if exit_code < 0:
        return f"killed by signal {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"
