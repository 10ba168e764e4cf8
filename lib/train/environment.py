"""The CPU environment of processes that compute: set before they import torch."""

_ALLOCATOR_BYTES = 16 << 30
_ALLOCATOR_PAD_BYTES = 1 << 30


def cpu_environment(threads: int) -> dict[str, str]:
    """Environment variables for a worker with that many compute threads.

    Waiting threads sleep rather than spin: a spinning thread of one rank takes the core from another. Freed memory stays
    with the process: giving large blocks back and faulting them in again takes up to a third of a training step. One arena
    for all threads, because only the first keeps large blocks, and a worker's method doesn't run in the main thread. Memory is
    asked for in huge pages, where the kernel has them for those who ask: a step's addresses are then found 1 to 2 % faster.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; a worker needs at least 1")
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(_ALLOCATOR_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(_ALLOCATOR_BYTES),
        "MALLOC_TOP_PAD_": str(_ALLOCATOR_PAD_BYTES),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
