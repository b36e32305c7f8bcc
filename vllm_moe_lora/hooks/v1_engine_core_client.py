"""vllm/v1/engine/core_client.py: calls that wait for the answer of an engine that is dead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _start_engine_core_monitor(original: Callable[..., Any]) -> Callable[..., Any]:
    def start_engine_core_monitor(self: Any) -> None:
        config = self.vllm_config
        if config.lora_config is not None and config.model_config.is_moe:
            self.resources.moe_lora_waiting = self.utility_results
        original(self)

    return start_engine_core_monitor


def _validate_alive(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_alive(self: Any, frames: Any) -> None:
        from ..loading.unanswered import end

        try:
            original(self, frames)
        except Exception as error:
            end(getattr(self, "moe_lora_waiting", {}), error)
            raise

    return validate_alive


def _call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        from ..loading.unanswered import end

        self.engine_dead = True  # no call begins after this
        end(getattr(self, "moe_lora_waiting", {}), EngineDeadError())
        original(self)

    return call


_COMMON: dict[str, Any] = {
    "feature": "safe-loading",
    "releases": ">=0.29,<0.34",
    "upstream": "",
    "until": "upstream ends calls of the engine that wait for an answer when it dies",
}

HOOKS = (
    Hook(
        target="vllm.v1.engine.core_client:MPClient.start_engine_core_monitor",
        make=_start_engine_core_monitor,
        why="the hooks of BackgroundResources must know which calls wait",
        **_COMMON,
    ),
    Hook(
        target="vllm.v1.engine.core_client:BackgroundResources.validate_alive",
        make=_validate_alive,
        why="when a worker or the engine dies, calls such as add_lora wait for ever, and with them "
        "the request for which an adapter is loaded",
        **_COMMON,
    ),
    Hook(
        target="vllm.v1.engine.core_client:BackgroundResources.__call__",
        make=_call,
        why="the same, if the engine's process is killed and cannot say so",
        **_COMMON,
    ),
)
