"""A key for compiled artefacts, which tells this package's versions and settings apart.

vLLM keeps what torch.compile made, under a key of its own version, config and environment. That key
knows nothing of replaced functions and wrapped modules. So an artefact of bare vLLM, in which a
gate is called without LoRA, could be used in an engine with this package, and the gate's LoRA
would be silently ignored.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from . import envs, patching, records


def fingerprint() -> str:
    """64 hex digits that change with the code of this package and with what is applied of it.

    It is the same in all processes of one engine, and after a restart with the same settings.
    """
    applied = sorted(
        f"{getattr(one.owner, '__module__', '')}.{getattr(one.owner, '__name__', '')}.{one.name}"
        for one in patching._applied
    )
    kernels = str(envs.get("VLLM_MOE_LORA_KERNELS"))
    tuned = records.digest() if kernels != "upstream" else ""
    found = "\n".join([_code(), kernels, tuned, *applied])
    return hashlib.sha256(found.encode()).hexdigest()


def combined(key: str) -> str:
    """``key`` and the fingerprint as a key of the same length (at most 64)."""
    return hashlib.sha256(f"{key}{fingerprint()}".encode()).hexdigest()[: len(key)]


@functools.cache
def _code() -> str:
    """A hash of all Python files of the package, or of its copy in a patched vLLM."""
    found, folder = hashlib.sha256(), Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        found.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()
