"""vllm/v1/engine/llm_engine.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_moe_lora.patching import Hook


def _add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora(self: Any, lora_request: Any) -> bool:
        from vllm_moe_lora.store import front

        known = front.of(self)
        try:
            done = bool(original(self, lora_request))
        except Exception as error:
            raise (error if known is None else front.plainly(error)) from error
        if known is not None:
            known.loaded(lora_request)
        return done

    return add_lora


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, *args: Any, **more: Any) -> Any:
        from vllm_moe_lora.store import front

        request, known = front.lora_request_of(args, more), front.of(self)
        if request is not None and known is not None and not known.has(request):
            self.add_lora(request)
        return original(self, *args, **more)

    return add_request


_COMMON: dict[str, Any] = {
    "feature": "safe-loading",
    "releases": ">=0.29,<0.34",
    "upstream": "",
    "until": "upstream loads adapters before it schedules their requests",
    "why": "an adapter that fails to load does so inside a batch: the engine dies, or hangs at the "
    "next call",
}

HOOKS = (
    Hook(target="vllm.v1.engine.llm_engine:LLMEngine.add_lora", make=_add_lora, **_COMMON),
    Hook(target="vllm.v1.engine.llm_engine:LLMEngine.add_request", make=_add_request, **_COMMON),
)
