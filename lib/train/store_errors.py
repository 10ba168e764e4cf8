"""What an object store raises, as one of our errors: stores have exceptions of their own, with no common root."""

from collections.abc import Iterator
from contextlib import contextmanager

from lib.core.errors import ArtifactCorruptError, InfraError, PostflyteError


@contextmanager
def reading(where: str) -> Iterator[None]:
    """What is not there is damage; anything else is the machine's fault, and no reason to give something up."""
    try:
        yield
    except PostflyteError:
        raise
    except FileNotFoundError as error:
        raise ArtifactCorruptError(f"{where}: is missing") from error
    except Exception as error:
        raise InfraError(f"{where}: can't be read: {type(error).__name__}: {error}") from error


@contextmanager
def writing() -> Iterator[None]:
    """Whatever goes wrong is an OSError, as it is on a disk."""
    try:
        yield
    except (OSError, PostflyteError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
