"""`python -m tests.lib.core.killed_writer FOLDER`: two saves, killed at the n-th thing they do to the file system, for every n.

Each n has a process and a folder of its own, FOLDER/n. Prints what ended each, one a line: "killed", and "saved" at the last,
which comes to its end before its n-th event.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lib.core.artifact import stage_artifact

EVENTS = ("open", "os.mkdir", "os.rename", "os.chmod", "os.listdir", "os.scandir")
"""What Python tells an audit hook of, before it happens."""


def save(target: Path) -> None:
    with stage_artifact(target, "sample") as staged:
        for name in ("a", "b"):
            (staged.path / name).write_bytes(name.encode() * 50_000)


def save_until_killed(folder: Path, at_event: int) -> None:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and any(isinstance(arg, (str, Path)) and str(folder) in str(arg) for arg in args):
            seen += 1
            if seen == at_event:
                os.kill(os.getpid(), signal.SIGKILL)

    folder.mkdir()
    save(folder / "first")
    sys.addaudithook(hook)
    save(folder / "second")


def main(root: Path) -> None:
    ended = "killed"
    for at_event in range(1, 1000):
        child = os.fork()
        if not child:
            save_until_killed(root / str(at_event), at_event)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"event {at_event}: status {status}"
        ended = "killed" if os.WIFSIGNALED(status) else "saved"
        print(ended)
        if ended == "saved":
            return
    raise AssertionError(f"a save does less than 1000 things to the file system, and this one was still {ended}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
