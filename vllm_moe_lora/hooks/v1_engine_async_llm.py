"""vllm/v1/engine/async_llm.py"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from vllm_moe_lora.patching import Hook

PAUSE = 0.02  # seconds between two questions whether an adapter is staged


def _add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_lora(self: Any, lora_request: Any) -> bool:
        from vllm_moe_lora.store import front

        known = front.of(self)
        if known is None:
            return bool(await original(self, lora_request))
        async with known.locks[lora_request.lora_int_id]:
            try:
                while not await original(self, _marked(lora_request)):
                    await asyncio.sleep(PAUSE)
                done = bool(await original(self, lora_request))
            except Exception as error:
                raise front.plainly(error) from error
            known.loaded(lora_request)
        return done

    return add_lora


def _marked(request: Any) -> Any:
    from vllm.lora.request import LoRARequest

    from vllm_moe_lora.store.ahead import MARK

    return LoRARequest(
        lora_name=request.lora_name,
        lora_int_id=request.lora_int_id,
        lora_path=MARK + request.lora_path,
        load_inplace=request.load_inplace,
    )


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(self: Any, *args: Any, **more: Any) -> Any:
        from vllm_moe_lora.store import front

        request, known = front.lora_request_of(args, more), front.of(self)
        if request is not None and known is not None and not known.has(request):
            await self.add_lora(request)
        return await original(self, *args, **more)

    return add_request


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
        "of the server gets a token; load_inplace loads again for every batch and leaves cached "
        "prefixes of the old weights in use",
        **_COMMON,
    ),
    Hook(
        target="vllm.v1.engine.async_llm:AsyncLLM.add_request",
        make=_add_request,
        why="an adapter that fails to load does so inside a batch and takes the engine with it",
        **_COMMON,
    ),
)
