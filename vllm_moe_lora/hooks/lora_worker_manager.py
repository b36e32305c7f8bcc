"""vllm/lora/worker_manager.py: loads an adapter in a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.lora.worker_manager"


def _load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        manager = self._adapter_manager
        from ..fitting.moe_layers import serves_moe

        if not serves_moe(manager):
            return original(self, lora_request)
        from ..loading import background

        staged = background.loader_of(self).take(lora_request.lora_int_id, lora_request.lora_path)
        return staged if staged is not None else _read(original, self, lora_request)

    return _load_adapter


def _read(original: Callable[..., Any], worker: Any, request: Any) -> Any:
    """Read the adapter and fit it to the model, before upstream removes its earlier version."""
    from ..fitting.explain import refusal
    from ..fitting.fit import fit

    manager = worker._adapter_manager
    try:
        lora = original(worker, request)
        fit(manager, lora)
    except Exception as error:
        better = refusal(manager, request, error)
        if better is error:
            raise
        raise better from error
    return lora


def _add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_adapter(self: Any, lora_request: Any) -> bool:
        from ..loading import background

        if not lora_request.lora_path.startswith(background.STAGE_PREFIX):
            return bool(original(self, lora_request))
        number, path = (
            lora_request.lora_int_id,
            lora_request.lora_path.removeprefix(background.STAGE_PREFIX),
        )
        if number in self.list_adapters() and not lora_request.load_inplace:
            return True
        return background.loader_of(self).ready(
            number, path, lambda: _stage(self, lora_request, path)
        )

    return add_adapter


def _stage(worker: Any, request: Any, path: str) -> Any:
    """Read and fit the adapter at ``path``, in the thread of loading/background.py."""
    from vllm.lora.request import LoRARequest

    return worker._load_adapter(LoRARequest(request.lora_name, request.lora_int_id, path))


_STAGING: dict[str, Any] = {
    "feature": "safe-loading",
    "make": _add_adapter,
    "releases": ">=0.29,<0.34",
    "why": "an adapter is read and packed on the thread that runs the model, so no request gets a "
    "token meanwhile",
    "upstream": "",
    "until": "upstream reads adapters in a thread of their own",
}

HOOKS = (
    Hook(
        feature="adapters",
        target=f"{_FILE}:WorkerLoRAManager._load_adapter",
        make=_load_adapter,
        releases=">=0.11.1,<0.34",
        why="an adapter that does not fit the model is refused only after its earlier version was "
        "removed; and the error for a rank above max_lora_rank names neither the tensor nor what "
        "to do",
        upstream="",
        until="upstream checks a new adapter before it removes the earlier version, and names the "
        "tensor",
    ),
    Hook(target=f"{_FILE}:WorkerLoRAManager.add_adapter", **_STAGING),
    Hook(target=f"{_FILE}:LRUCacheWorkerLoRAManager.add_adapter", **_STAGING),
)
