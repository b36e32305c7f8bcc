"""vllm/v1/worker/lora_model_runner_mixin.py: dummy adapters of dummy batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _maybe_setup_dummy_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_setup_dummy_loras(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers.data_parallel import has_adapters

        return contextlib.nullcontext() if has_adapters(self) else original(self, *args, **more)

    return maybe_setup_dummy_loras


HOOKS = (
    Hook(
        feature="data-parallel",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin."
        "maybe_setup_dummy_loras",
        make=_maybe_setup_dummy_loras,
        releases=">=0.30,<0.34",
        why="it loads dummy adapters for each dummy batch of a rank without requests, and removes "
        "all adapters after it, also those of tokens that other ranks send to its experts",
        upstream="",
        until="a dummy batch leaves the adapters alone",
    ),
)
