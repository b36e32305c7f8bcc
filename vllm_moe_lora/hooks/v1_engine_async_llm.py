"""vllm/v1/engine/async_llm.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_lora(self: Any, lora_request: Any) -> bool:
        from ..loading import admit, front_end

        known = front_end.of(self)
        if known is None:
            return bool(await original(self, lora_request))
        async with known.locks[lora_request.lora_int_id]:
            if not lora_request.load_inplace and known.has(lora_request):
                return True
            return await admit.load(self, lora_request)

    return add_lora


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(self: Any, *args: Any, **more: Any) -> Any:
        from ..loading import admit, front_end

        request, known = front_end.lora_request_of(args, more), front_end.of(self)
        if request is None or known is None:
            return await original(self, *args, **more)
        number = request.lora_int_id
        async with known.locks[number]:
            if not known.has(request):
                await admit.load(self, request)
            known.entering[number] += 1
        try:
            args, more = front_end.with_lora_request(known.now(request), args, more)
            return await original(self, *args, **more)
        finally:
            known.entering[number] -= 1

    return add_request


def _remove_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def remove_lora(self: Any, lora_id: int) -> bool:
        from ..loading import front_end

        known = front_end.of(self)
        if known is not None:
            known.forget(lora_id)
        return bool(await original(self, lora_id))

    return remove_lora


_COMMON: dict[str, Any] = {
    "feature": "safe-loading",
    "releases": ">=0.29,<0.34",
    "upstream": "",
    "until": "upstream loads adapters beside the engine's steps, and before it schedules",
}

HOOKS = (
    Hook(
        target="vllm.v1.engine.async_llm:AsyncLLM.add_lora",
        make=_add_lora,
        why="while an adapter is read and packed, which takes seconds for a MoE model, no request "
        "of the server gets a token; load_inplace loads again for every batch, changes the weights "
        "under requests in flight, and leaves cached prefixes of the old ones in use",
        **_COMMON,
    ),
    Hook(
        target="vllm.v1.engine.async_llm:AsyncLLM.add_request",
        make=_add_request,
        why="an adapter that fails to load does so inside a batch and takes the engine with it",
        **_COMMON,
    ),
    Hook(
        target="vllm.v1.engine.async_llm:AsyncLLM.remove_lora",
        make=_remove_lora,
        why="an adapter that was removed is loaded again before its next request is scheduled",
        **_COMMON,
    ),
)
