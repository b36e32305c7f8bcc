"""vllm/v1/engine/async_llm.py"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from vllm_moe_lora.patching import Hook

PAUSE = 0.02  # seconds between two questions whether an adapter is staged


def _add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_lora(self: Any, lora_request: Any) -> bool:
        if getattr(self.model_config, "is_moe", False):
            from vllm.lora.request import LoRARequest

            from vllm_moe_lora.store.ahead import MARK

            staged = LoRARequest(
                lora_name=lora_request.lora_name,
                lora_int_id=lora_request.lora_int_id,
                lora_path=MARK + lora_request.lora_path,
                load_inplace=lora_request.load_inplace,
            )
            while not await original(self, staged):
                await asyncio.sleep(PAUSE)
        return bool(await original(self, lora_request))

    return add_lora


HOOKS = (
    Hook(
        feature="background-loading",
        target="vllm.v1.engine.async_llm:AsyncLLM.add_lora",
        make=_add_lora,
        releases=">=0.29,<0.34",
        why="while an adapter is read and packed, which takes seconds for a MoE model, no request "
        "of the server gets a token",
        upstream="",
        until="upstream loads adapters beside the engine's steps",
    ),
)
