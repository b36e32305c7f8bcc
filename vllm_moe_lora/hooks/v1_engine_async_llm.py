"""vllm/v1/engine/async_llm.py: loads an adapter before its requests, in a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_lora(self: Any, lora_request: Any) -> bool:
        from ..loading import admit, front_end

        held = front_end.held_adapters(self)
        if held is None:
            return bool(await original(self, lora_request))
        held.check(lora_request)
        number = lora_request.lora_int_id
        async with held.locks[number]:
            if not lora_request.load_inplace and held.is_loaded(lora_request):
                return True
            with held.claimed(number):
                return await admit.load(self, lora_request)

    return add_lora


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(self: Any, *args: Any, **more: Any) -> Any:
        from ..loading import admit, front_end

        request = front_end.lora_request_of(args, more)
        held = front_end.held_adapters(self) if request is not None else None
        if request is None or held is None:
            return await original(self, *args, **more)
        number = request.lora_int_id
        with front_end.refused_requests(request):
            held.check(request)
            async with held.locks[number]:
                with held.claimed(number):
                    if not held.is_loaded(request):
                        await admit.load(self, request)
                    await admit.give_slot(self, request)
                    held.entering[number] += 1
        try:
            args, more = front_end.with_lora_request(held.for_scheduler(request), args, more)
            return await original(self, *args, **more)
        finally:
            held.entering[number] -= 1

    return add_request


def _remove_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def remove_lora(self: Any, lora_id: int) -> bool:
        from ..loading import admit, front_end

        held = front_end.held_adapters(self)
        if held is not None:
            held.check_alone(lora_id, True, "remove_lora")
            if held.slots is not None:
                async with held.locks[lora_id]:
                    return await admit.remove(self, lora_id, lambda: original(self, lora_id))
            held.forget(lora_id)
        return bool(await original(self, lora_id))

    return remove_lora


def _pin_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def pin_lora(self: Any, lora_id: int) -> bool:
        from ..loading import admit, front_end

        held = front_end.held_adapters(self)
        if held is None:
            return bool(await original(self, lora_id))
        async with held.locks[lora_id]:
            with held.claimed(lora_id):
                if (request := held.request_of(lora_id)) is not None:
                    await admit.give_slot(self, request)
                    if held.slots is None:
                        # A batch may have taken its place.
                        await self.engine_core.add_lora_async(request)
                done = bool(await original(self, lora_id))
            held.pinned.add(lora_id)
        return done

    return pin_lora


_COMMON: dict[str, Any] = {
    "feature": "safe-loading",
    "releases": ">=0.29,<0.34",
    "upstream": "",
    "until": "upstream reads adapters in a thread of their own, and before their requests are "
    "scheduled",
}

HOOKS = (
    Hook(
        target="vllm.v1.engine.async_llm:AsyncLLM.add_lora",
        make=_add_lora,
        why="while an adapter is read and packed, which takes seconds for a MoE model, no request "
        "of the server gets a token. And load_inplace loads the adapter again for every batch, "
        "changes the weights of requests that are running, and keeps using cached prefixes that "
        "were computed with the old weights",
        **_COMMON,
    ),
    Hook(
        target="vllm.v1.engine.async_llm:AsyncLLM.add_request",
        make=_add_request,
        why="an adapter is loaded when the first batch with it runs; if that fails, the engine "
        "stops",
        **_COMMON,
    ),
    Hook(
        target="vllm.v1.engine.async_llm:AsyncLLM.pin_lora",
        make=_pin_lora,
        why="if every slot has a pinned adapter, a request for another one stops the engine",
        **_COMMON,
    ),
    Hook(
        target="vllm.v1.engine.async_llm:AsyncLLM.remove_lora",
        make=_remove_lora,
        why="the hooks of add_lora and add_request must know that the adapter has to be loaded "
        "again",
        **_COMMON,
    ),
)
