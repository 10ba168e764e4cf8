"""A Ray for tests; a module that needs it imports the fixture."""

from collections.abc import Iterator

import pytest
import ray

from lib.cluster.ray_backend import start_ray


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One for all tests of this process: groups join it as they join one that a user started, and only the end stops it."""
    start_ray(4)
    yield
    ray.shutdown()
