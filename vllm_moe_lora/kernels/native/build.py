"""Compiles the native kernels with numba, or loads their machine code from disk.

numba is in vLLM's requirements for CPUs. Compiling takes some seconds, once for each machine. The
machine code is kept below vLLM's cache folder, in a folder of its own for each version of the
kernels, of numba and of Python, and for each CPU model: so all processes that share a file would
write the same, and numba replaces files in one step. Where that folder cannot be written, one in
the temporary folder is used that belongs to this user alone, because code is loaded from it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import envs
from ...log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Kernels:
    """Addresses of the kernels: C functions of the address of a table; see dense.py, routed.py."""

    add_lora: int
    plan: int
    before: int
    after: int
    keep: Any  # numba's functions; their code lives as long as they do


@functools.cache
def kernels() -> Kernels | None:
    """Return the kernels, or None if this machine cannot have them; one log line says why."""
    if not envs.get("VLLM_MOE_LORA_NATIVE"):
        return None
    try:
        if sys.byteorder != "little":
            raise NotImplementedError("this CPU is big-endian")
        from . import memory

        if not memory.supported():
            raise NotImplementedError("this CPU has no fused multiply-add")
        return _compile()
    except Exception as error:
        # Whatever fails here, LoRA works without.
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning(
        "LoRA on the CPU runs without native kernels, which costs speed: %s. Cure: install the "
        "numba that vLLM's requirements for CPUs name",
        why,
    )
    return None


def _compile() -> Kernels:
    from numba import cfunc
    from numba.core import config

    from . import dense, routed

    functions = (dense.add_lora, routed.plan, routed.before, routed.after)
    before = config.CACHE_DIR
    for folder in (*_folders(), None):
        # numba chooses the folder when a function is decorated, and takes it from here.
        config.CACHE_DIR = "" if folder is None else str(folder)
        try:
            start = time.perf_counter()
            made = tuple(
                cfunc("void(int64)", cache=folder is not None)(function) for function in functions
            )
        except OSError as error:  # the disk is full, for example
            logger.debug("numba cannot keep code in %s: %s", folder, error)
            continue
        finally:
            config.CACHE_DIR = before
        taken = time.perf_counter() - start
        where = "not kept" if folder is None else f"kept in {folder}"
        logger.info("LoRA on the CPU: native kernels, made in %.1f s, %s", taken, where)
        add_lora, plan, routed_before, routed_after = (one.address for one in made)
        return Kernels(add_lora, plan, routed_before, routed_after, keep=made)
    raise AssertionError("not reached: without a folder nothing is written")


def _folders() -> Iterator[Path]:
    """Yield the folders for machine code that can be written, the best first."""
    key = _key()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = os.environ.get("VLLM_CACHE_ROOT") or os.path.join(cache, "vllm")
    folder = Path(root, "moe_lora", key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield folder
    except OSError as error:
        logger.debug("%s cannot be written: %s", folder, error)
    user = os.getuid() if hasattr(os, "getuid") else 0
    private = Path(tempfile.gettempdir(), f"vllm-moe-lora-{user}")
    try:
        private.mkdir(mode=0o700, exist_ok=True)
        found = private.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022
        if ours or not hasattr(os, "getuid"):
            folder = private / key
            folder.mkdir(exist_ok=True)
            yield folder
    except OSError as error:
        logger.debug("%s cannot be written: %s", private, error)


def _key() -> str:
    """Return a name for the machine code of these sources, for this CPU, numba and Python."""
    import llvmlite
    import numba
    from llvmlite import binding

    digest = hashlib.sha256()
    for name in ("memory.py", "vectors.py", "loops.py", "dense.py", "routed.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    cpu = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    digest.update(repr((numba.__version__, llvmlite.__version__, sys.version, cpu)).encode())
    return digest.hexdigest()[:16]
