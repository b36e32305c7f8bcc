"""The class for vLLM's ``worker_extension_cls``: workers that take adapters from memory."""

from __future__ import annotations

from typing import Any

from ..loading import memory
from .noise import NoiseWorker


class Worker(NoiseWorker):
    """Mixed into vLLM's worker class if its full name is the engine's ``worker_extension_cls``.

    An engine with it takes what `rl.push` sends. Trainers that run inside of the worker may call
    `moe_lora_push` themselves.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Worker:
        memory.allow()
        return super().__new__(cls)

    def moe_lora_push(
        self, name: str, tensors: dict[str, Any], config: dict[str, Any], lora_int_id: int
    ) -> bool:
        """Load an adapter from this process's memory, in place of an earlier one with this id.

        Call it while no request uses the adapter: here nothing is known about requests. All ranks
        need the same call with all tensors.

        Args:
            name: of the adapter.
            tensors: by name, on any device.
            config: the content of adapter_config.json.
            lora_int_id: the adapter's id.

        Raises:
            AdapterError: it does not fit. The earlier one stays.
        """
        from vllm.lora.request import LoRARequest

        with memory.offered(name, tensors, config, local=True) as path:
            request = LoRARequest(name, lora_int_id, path, load_inplace=True)
            return bool(self.model_runner.lora_manager.add_adapter(request))
