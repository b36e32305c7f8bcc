"""vllm/v1/engine/llm_engine.py: loads an adapter before its requests, in the class LLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora(self: Any, lora_request: Any) -> bool:
        from ..loading import admit, front_end

        held = front_end.held_adapters(self)
        if held is None:
            return bool(original(self, lora_request))
        held.check(lora_request)
        if not lora_request.load_inplace and held.is_loaded(lora_request):
            return True
        return admit.load_sync(self, lora_request)

    return add_lora


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, *args: Any, **more: Any) -> Any:
        from ..loading import admit, front_end

        request = front_end.lora_request_of(args, more)
        held = front_end.held_adapters(self) if request is not None else None
        if request is not None and held is not None:
            held.check(request)
            if not held.is_loaded(request):
                admit.load_sync(self, request)
            args, more = front_end.with_lora_request(held.for_scheduler(request), args, more)
        return original(self, *args, **more)

    return add_request


def _remove_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def remove_lora(self: Any, lora_id: int) -> bool:
        from ..loading import front_end

        held = front_end.held_adapters(self)
        if held is not None:
            held.forget(lora_id)
        return bool(original(self, lora_id))

    return remove_lora


def _pin_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def pin_lora(self: Any, lora_id: int) -> bool:
        from ..loading import front_end

        held = front_end.held_adapters(self)
        if held is None:
            return bool(original(self, lora_id))
        if (request := held.request_of(lora_id)) is not None:
            self.engine_core.add_lora(request)  # a batch may have taken its place
        done = bool(original(self, lora_id))
        held.pinned.add(lora_id)
        return done

    return pin_lora


_COMMON: dict[str, Any] = {
    "feature": "safe-loading",
    "releases": ">=0.29,<0.34",
    "upstream": "",
    "until": "upstream loads adapters before it schedules their requests",
    "why": "an adapter is loaded when the first batch with it runs; if that fails, the engine "
    "stops, or hangs at the next call",
}
_CLASS = "vllm.v1.engine.llm_engine:LLMEngine"

HOOKS = (
    Hook(target=f"{_CLASS}.add_lora", make=_add_lora, **_COMMON),
    Hook(target=f"{_CLASS}.add_request", make=_add_request, **_COMMON),
    Hook(target=f"{_CLASS}.pin_lora", make=_pin_lora, **_COMMON),
    Hook(target=f"{_CLASS}.remove_lora", make=_remove_lora, **_COMMON),
)
