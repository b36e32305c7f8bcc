"""Runs native kernels on the threads that torch's own operators use.

vLLM binds torch's OpenMP threads to cores, and divides the cores among its workers. A second pool
of threads, such as numba's, would fight with them for the same cores. So a kernel is started as a
parallel region of the very OpenMP runtime that torch has loaded. There is no other thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch


@functools.cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """Return ``GOMP_parallel`` of torch's OpenMP runtime: GNU's, LLVM's and Intel's have it.

    Returns:
        The function; None if there is none, or if it belongs to another runtime than torch's.
    """
    try:
        library = ctypes.CDLL(None)
        function, set_threads = library.GOMP_parallel, library.omp_set_num_threads
    except (AttributeError, OSError):
        return None
    # If it is torch's runtime, torch sees how many threads we ask it for.
    threads = torch.get_num_threads()
    set_threads(threads + 1)
    same = torch.get_num_threads() == threads + 1
    set_threads(threads)
    if not same or torch.get_num_threads() != threads:
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function  # type: ignore[no-any-return]


@functools.cache
def _function(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)


def run(kernel: int, table: int, one_thread: bool) -> None:
    """Run a kernel and wait for it. The GIL is released meanwhile.

    Args:
        kernel: its address.
        table: the address of its table.
        one_thread: run it on this thread only: the work is too small for more.
    """
    if not one_thread:
        parallel = _parallel()
        if parallel is not None:
            # 0: as many threads as torch's operators have, or one. With another number it would
            # end threads and start new ones, which vLLM has not bound to cores.
            parallel(kernel, table, 0, 0)
            return
    _function(kernel)(table)
