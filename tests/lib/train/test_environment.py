"""Laws of the CPU environment: threads are what was asked for, waiting threads sleep, freed memory stays mapped."""

import os
import subprocess
import sys

import pytest

from lib.train.environment import cpu_environment


def test_threads_and_profile() -> None:
    env = cpu_environment(3)
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == env["RAYON_NUM_THREADS"] == "3"
    assert env["OMP_WAIT_POLICY"] == "PASSIVE" and env["GOMP_SPINCOUNT"] == "0"
    assert int(env["MALLOC_MMAP_THRESHOLD_"]) == 16 * 2**30
    assert all(isinstance(value, str) for value in env.values())


FAULTS_OF_A_THREAD = """
import resource, threading
import numpy as np

def work():
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(100 << 20, np.uint8)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_memory_freed_by_a_thread_is_not_faulted_in_again() -> None:
    """A worker's method runs in a thread that isn't the main one. 100 MiB are 50 pages even where pages are huge."""
    environment = {**os.environ, **cpu_environment(1)}
    command = [sys.executable, "-c", FAULTS_OF_A_THREAD]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    first, *later = map(int, printed.split())
    assert first >= 50 and sum(later) < 50


def test_no_threads_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cpu_environment(0)
