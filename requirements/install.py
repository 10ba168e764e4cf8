"""Install a full lock file into the running virtual environment, with progress; standard library only.

`python requirements/install.py requirements/cpu.txt` installs exactly what the file lists (`--no-deps`), torch first: from
wherever pip is configured to look, else from PyTorch's index of CPU wheels. While the small packages are fetched, the large
ones' bytecode is compiled: else the first import of each would, one after the other. Then it installs this project, editable.
"""

import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LARGE = ("torch", "vllm", "ray", "transformers")
"""Fetched first and compiled beside the rest. Of transformers' models, the few that are used are left to their first import."""
COMPILE = [sys.executable, "-m", "compileall", "-qq", "-x", r"transformers/models/\w+/"]
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOG_TAIL_LINES = 30
PIP = [
    sys.executable,
    "-m",
    "pip",
    "install",
    "--no-deps",
    "--no-compile",
    "--disable-pip-version-check",
    "--progress-bar",
    "off",
]


def main(lock_file: Path) -> int:
    """0 when all is installed; else prints the end of pip's output."""
    lines = [line.split("#")[0].strip() for line in lock_file.read_text(encoding="utf-8").splitlines()]
    torch, *large = (next(line for line in lines if line.startswith((f"{name}==", f"{name}-cpu=="))) for name in LARGE)
    log = Path(sys.prefix) / "install.log"
    log.write_bytes(b"")
    total = sum(1 for line in lines if line)
    steps = (
        lambda: run([torch], log, "torch", total) or run([torch, "--index-url", TORCH_CPU_INDEX], log, "torch", total),
        lambda: run(large, log, "large packages", total),
        lambda: compiled(lambda: run(["-r", str(lock_file)], log, "packages", total)),
        lambda: run(["--no-build-isolation", "--editable", str(REPOSITORY)], log, "postflyte", total),
    )
    for step in steps:
        if not step():
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
            print("\n".join(tail), f"\nset-up failed; the whole output of pip is in {log}", sep="", file=sys.stderr)
            return 1
    return 0


def compiled(beside: Callable[[], bool]) -> bool:
    """Compile the large packages while something else runs; a file that is no valid Python is not our concern."""
    packages = Path(sysconfig.get_path("purelib"))
    folders = [str(packages / name) for name in LARGE]
    compiling = subprocess.Popen([*COMPILE, *folders])
    try:
        return beside()
    finally:
        compiling.wait()


def run(arguments: list[str], log: Path, what: str, total: int) -> bool:
    """Run pip and show how far it is; its output goes to the end of `log`."""
    started = shown = time.monotonic()
    every_seconds = 1.0 if sys.stdout.isatty() else 15.0
    with log.open("ab") as stream:
        begin = stream.tell()
        process = subprocess.Popen([*PIP, *arguments], stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - shown >= every_seconds:
                shown = time.monotonic()
                show(f"{what}: {progress(log, begin, total)}, {shown - started:.0f} s", end="")
    show(
        f"{what}: {'ready' if process.returncode == 0 else 'not installed'} after {time.monotonic() - started:.0f} s", end="\n"
    )
    return process.returncode == 0


def progress(log: Path, begin: int, total: int) -> str:
    """pip first collects everything and installs after; the second is counted in site-packages."""
    output = log.read_bytes()[begin:]
    if b"Installing collected packages" in output:
        installed = sum(1 for _ in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
        return f"installed {min(installed, total)}/{total}"
    return f"fetched {output.count(b'Collecting ')}/{total}"


def show(text: str, end: str) -> None:
    if sys.stdout.isatty():
        print(f"\r\x1b[K{text}", end=end, flush=True)
    else:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
