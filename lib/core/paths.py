"""Where things live on this machine, and how names become paths."""

import os
import re
from pathlib import Path

from lib.core.errors import ConfigError

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def home() -> Path:
    """Root of everything Postflyte keeps: `$POSTFLYTE_HOME`, by default `~/.cache/postflyte`."""
    return Path(os.environ.get("POSTFLYTE_HOME") or Path.home() / ".cache" / "postflyte").absolute()


def artifact_store() -> Path:
    """Folder of content-addressed artifacts: `<kind>/<digest>`."""
    return home() / "artifacts"


def runs_root() -> Path:
    """Folder of run folders (checkpoints under way, logs, metrics), one for each run identity."""
    return home() / "runs"


def assets_root() -> Path:
    """Folder of downloaded models and tokenizers."""
    return home() / "assets"


def mlflow_uri() -> str:
    """`$MLFLOW_TRACKING_URI`, by default a sqlite file under `home()`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def safe_name(name: str, *, what: str) -> str:
    """`name`, if it is safe as one path component.

    Raises:
        ConfigError: empty, longer than 128, or with anything but letters, digits, `.`, `_` and `-`.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise ConfigError(f"{what} {name[:80]!r} can't be a file name; use 1 to 128 letters, digits, '.', '_' or '-'")
    return name
