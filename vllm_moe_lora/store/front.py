"""What an engine's front end remembers of adapters, so that a bad one never reaches a batch.

Upstream loads an adapter where its first request is scheduled: an error there takes the batch, and
the engine, with it. Here the front end asks for the load before it passes the request on, so that
the caller gets the error and nobody else notices.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict, defaultdict
from typing import Any

from vllm_moe_lora.adapters.errors import AdapterError


class Known:
    """The adapters that the workers hold, as far as the front end can tell.

    Workers keep the ``capacity`` (max_cpu_loras) adapters that were used last, and so does this.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used: OrderedDict[int, None] = OrderedDict()
        self._revisions: dict[int, int] = {}
        self.locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    def has(self, request: Any) -> bool:
        """Whether no load is needed; the adapter counts as used."""
        if request.load_inplace or request.lora_int_id not in self._used:
            return False
        self._used.move_to_end(request.lora_int_id)
        return True

    def loaded(self, request: Any) -> None:
        """A load went well.

        One that replaced an older version changes ``request``, which the server keeps for this
        name: it is not loaded again for every batch (load_inplace), and its path gets a spelling
        that no earlier version had, because cached prefixes are found by name and path.
        """
        self._used[request.lora_int_id] = None
        self._used.move_to_end(request.lora_int_id)
        while len(self._used) > self._capacity:
            self._used.popitem(last=False)
        if request.load_inplace:
            from vllm.lora.utils import get_adapter_absolute_path

            number = self._revisions.get(request.lora_int_id, 0) + 1
            self._revisions[request.lora_int_id] = number
            plain = re.sub(r"(/\.)+$", "", get_adapter_absolute_path(request.lora_path))
            request.lora_path = plain + "/." * number
            request.load_inplace = False


def of(engine: Any) -> Known | None:
    """The one `Known` of an `AsyncLLM` or `LLMEngine`; None without LoRA or without experts."""
    if engine.vllm_config.lora_config is None or not engine.model_config.is_moe:
        return None
    if not hasattr(engine, "moe_lora_known"):
        engine.moe_lora_known = Known(engine.vllm_config.lora_config.max_cpu_loras)
    found: Known = engine.moe_lora_known
    return found


def lora_request_of(args: tuple[Any, ...], more: dict[str, Any]) -> Any:
    """The LoRARequest among the arguments of `add_request` (without self), or None."""
    given = more.get("lora_request", args[4] if len(args) > 4 else None)
    prompt = more.get("prompt", args[1] if len(args) > 1 else None)
    return given or getattr(prompt, "lora_request", None)


def plainly(error: Exception) -> Exception:
    """The sentence of an `AdapterError` out of what vLLM's processes wrapped around it."""
    found = re.search(r"LoRA adapter \d+: .*", str(error), re.DOTALL)
    if isinstance(error, AdapterError) or found is None:
        return error
    return AdapterError(re.sub(r"['\"], please check.*$", "", found[0], flags=re.DOTALL))
