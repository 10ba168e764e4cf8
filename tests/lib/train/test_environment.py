"""Law of the CPU environment: threads are what was asked for, and waiting threads sleep."""

import pytest

from lib.train.environment import cpu_environment


def test_threads_and_profile() -> None:
    env = cpu_environment(3)
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == env["RAYON_NUM_THREADS"] == "3"
    assert env["OMP_WAIT_POLICY"] == "PASSIVE" and env["GOMP_SPINCOUNT"] == "0"
    assert int(env["MALLOC_MMAP_THRESHOLD_"]) == 16 * 2**30
    assert all(isinstance(value, str) for value in env.values())


def test_no_threads_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cpu_environment(0)
