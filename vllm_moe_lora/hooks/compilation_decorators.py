"""vllm/compilation/decorators.py: loads what torch.compile made at an earlier start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _try_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any:
        from ..layers.cpu import compiled

        with compiled.loadable(model.vllm_config):
            return original(model, aot_compilation_path)

    return _try_load_aot_compiled_fn


HOOKS = (
    Hook(
        feature="cpu-compile",
        target="vllm.compilation.decorators:_try_load_aot_compiled_fn",
        make=_try_load,
        releases=">=0.30,<0.34",
        why="on a CPU each start compiles the model again: 'function' object has no attribute "
        "'finalize_loading', because vLLM calls a method of its own backend on what Inductor made",
        upstream="",
        until="upstream calls finalize_loading only where it exists",
    ),
)
