"""vllm/v1/worker/lora_model_runner_mixin.py: LoRA when a model is loaded, and loaded again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _load_lora_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_lora_model(self: Any, model: Any, *args: Any, **more: Any) -> Any:
        from ..models.declare import declare
        from ..models.repair import expert_mapping, rename

        declare(model)
        rename(model)
        expert_mapping(model)
        return original(self, model, *args, **more)

    return load_lora_model


def _reset_lora_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def reset_lora_state(self: Any) -> None:
        worker_manager = getattr(self, "lora_manager", None)
        if not self.lora_config or worker_manager is None:
            return original(self)
        from ..fitting.moe_layers import serves_moe
        from ..rl.base_weights import fill_slots_again

        manager = worker_manager._adapter_manager
        if not serves_moe(manager):
            return original(self)
        # Upstream removes all adapters here, and resets what it derived from the vocabulary.
        worker_manager.remove_all_adapters = lambda: fill_slots_again(manager)
        try:
            return original(self)
        finally:
            del worker_manager.remove_all_adapters

    return reset_lora_state


def _maybe_setup_dummy_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_setup_dummy_loras(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers.data_parallel import has_adapters

        return contextlib.nullcontext() if has_adapters(self) else original(self, *args, **more)

    return maybe_setup_dummy_loras


HOOKS = (
    Hook(
        feature="model-classes",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
        make=_load_lora_model,
        releases=">=0.11.1,<0.34",
        why="MoE classes that could serve adapters, such as Kimi K2.5's, do not declare LoRA, and "
        "other classes declare only a part of their merged modules, so that ordinary adapters are "
        "refused. Up to 0.24 the engine does not start with classes without get_expert_mapping",
        upstream="https://github.com/vllm-project/vllm/issues/43840",
        until="upstream's classes declare LoRA completely: see models/rows.py",
    ),
    Hook(
        feature="base-weights",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.reset_lora_state",
        make=_reset_lora_state,
        releases=">=0.30,<0.34",
        why="after base weights are loaded again, all adapters are removed: those that came from a "
        "trainer's memory cannot be read again, and requests with them run the base model",
        upstream="",
        until="upstream keeps adapters when it loads base weights",
    ),
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
