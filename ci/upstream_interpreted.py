"""A plugin of pytest, `-p upstream_interpreted`: vLLM's Triton kernels, in Triton's interpreter.

ci/upstream.py loads it, under TRITON_INTERPRET=1, for tests that a patch's message marks so. Where
vLLM is built for a CPU it asks Triton for a backend "cpu". There is none, but the interpreter needs
none.
"""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import bf16_exact  # noqa: F401  without it the interpreter is wrong in bf16
from triton.backends import backends

_version = importlib.metadata.version
# The unpacked vLLM has no metadata.
importlib.metadata.version = lambda name: "0.33.0+cpu" if name == "vllm" else _version(name)
backends.setdefault("cpu", SimpleNamespace(driver=None))
