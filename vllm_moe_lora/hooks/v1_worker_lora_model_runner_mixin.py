"""vllm/v1/worker/lora_model_runner_mixin.py: dummy adapters of dummy batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _maybe_setup_dummy_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_setup_dummy_loras(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers.data_parallel import is_idle

        return contextlib.nullcontext() if is_idle(self) else original(self, *args, **more)

    return maybe_setup_dummy_loras


HOOKS = (
    Hook(
        feature="data-parallel",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin."
        "maybe_setup_dummy_loras",
        make=_maybe_setup_dummy_loras,
        releases=">=0.30,<0.34",
        why="it loads dummy adapters for each dummy batch, and removes all adapters after it; the "
        "hook of Worker.execute_dummy_batch tells it when not to",
        upstream="",
        until="a dummy batch leaves the adapters alone",
    ),
)
