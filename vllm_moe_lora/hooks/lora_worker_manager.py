"""vllm/lora/worker_manager.py: makes a worker's LoRA layers, and loads adapters into them."""

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

        loader, key = background.loader_of(self), (lora_request.lora_int_id, lora_request.lora_path)
        lora = loader.take(*key)
        if lora is None:
            lora = loader.take_removed(*key)
        if lora is None:
            lora = _read(original, self, lora_request)
        lora.moe_lora_path = lora_request.lora_path  # read by _keep_removed
        return lora

    return _load_adapter


def _create_lora_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_lora_manager(self: Any, model: Any, vllm_config: Any) -> Any:
        from ..layers.cpu import compiled

        wrapped = original(self, model, vllm_config)
        compiled.prepare(vllm_config, wrapped, self._adapter_manager)
        return wrapped

    return create_lora_manager


def _read(original: Callable[..., Any], worker: Any, request: Any) -> Any:
    """Read the adapter and fit it to the model, before upstream removes its earlier version."""
    from ..fitting.explain import refusal
    from ..fitting.fit import fit
    from ..fitting.read import all_adapters
    from ..loading import memory

    manager = worker._adapter_manager
    try:
        with all_adapters():
            if memory.is_memory(request.lora_path):
                return memory.load(worker, request)
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
        from ..loading import assigned, background

        lora_request = assigned.note(self._adapter_manager, lora_request)
        if not lora_request.lora_path.startswith(background.STAGE_PREFIX):
            return _keeping_removed(original, self, lora_request)
        number, path = (
            lora_request.lora_int_id,
            lora_request.lora_path.removeprefix(background.STAGE_PREFIX),
        )
        if number in self.list_adapters() and not lora_request.load_inplace:
            background.check_same(self._adapter_manager.get_adapter(number), lora_request, path)
            return True
        return background.loader_of(self).ready(
            number, path, lambda: _stage(self, lora_request, path)
        )

    return add_adapter


def _keeping_removed(original: Callable[..., Any], worker: Any, request: Any) -> bool:
    """Add an adapter, and keep those that upstream removes for it.

    The front end removes adapters that no request uses (loading/admit.py). Upstream removes another
    one only if all are in use, so it is needed again, perhaps when its files are gone.
    """
    from ..fitting.moe_layers import serves_moe
    from ..loading import background

    manager = worker._adapter_manager
    before = manager.list_adapters()
    # Upstream calls this in each step, for each adapter of the batch.
    if request.lora_int_id in before or not serves_moe(manager):
        return bool(original(worker, request))
    done = bool(original(worker, request))
    loader = background.loader_of(worker)
    for number in before.keys() - manager.list_adapters().keys():
        path = getattr(before[number], "moe_lora_path", None)
        if path is not None:
            loader.keep_removed(number, path, before[number], limit=manager.capacity)
    return done


def _apply_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    def _apply_adapters(self: Any, lora_requests: Any) -> None:
        from ..fitting.budget import unlimited
        from ..fitting.moe_layers import serves_moe
        from ..loading.pinned import places_for

        manager = self._adapter_manager
        if not lora_requests or not serves_moe(manager):
            return original(self, lora_requests)
        ids = {one.lora_int_id for one in lora_requests if one}
        with unlimited(manager), places_for(manager, ids):
            return original(self, lora_requests)

    return _apply_adapters


def _apply_unlimited(original: Callable[..., Any]) -> Callable[..., Any]:
    """Up to 0.27: refuse no adapter inside a step."""

    def _apply_adapters(self: Any, lora_requests: Any) -> None:
        from ..fitting.budget import unlimited

        with unlimited(self._adapter_manager):
            original(self, lora_requests)

    return _apply_adapters


def _stage(worker: Any, request: Any, path: str) -> Any:
    """Read and fit the adapter at ``path``, in the thread of loading/background.py."""
    from vllm.lora.request import LoRARequest

    return worker._load_adapter(LoRARequest(request.lora_name, request.lora_int_id, path))


def _remove_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def remove_adapter(self: Any, adapter_id: int) -> bool:
        from ..loading import assigned

        loader = getattr(self, "moe_lora_background_loader", None)
        if loader is not None:  # of a MoE model
            from ..loading import pinned

            loader.forget(adapter_id)
            pinned.forget(self._adapter_manager, adapter_id)
        assigned.forget(self._adapter_manager, adapter_id)
        return bool(original(self, adapter_id))

    return remove_adapter


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
    Hook(
        feature="safe-loading",
        target=f"{_FILE}:WorkerLoRAManager.remove_adapter",
        make=_remove_adapter,
        releases=">=0.29,<0.34",
        why="the hooks of add_adapter keep adapters that were removed while requests used them; "
        "an adapter that the caller removes must not be kept",
        upstream="",
        until="the hooks of add_adapter go",
    ),
    Hook(
        feature="cpu-compile",
        target=f"{_FILE}:LRUCacheWorkerLoRAManager.create_lora_manager",
        make=_create_lora_manager,
        releases=">=0.30,<0.34",
        why="the operators have to be there before the model is traced",
        upstream="",
        until="upstream's punica wrapper and experts are operators on the CPU, too",
    ),
    Hook(
        feature="safe-loading",
        target=f"{_FILE}:LRUCacheWorkerLoRAManager._apply_adapters",
        make=_apply_adapters,
        releases=">=0.29,<0.34",
        why="a batch that needs more slots than pinned adapters leave stops the engine, because "
        "the scheduler counts only the batch's own adapters",
        upstream="",
        until="upstream's scheduler counts the slots of pinned adapters",
    ),
    Hook(
        feature="cpu-experts",
        target=f"{_FILE}:LRUCacheWorkerLoRAManager._apply_adapters",
        make=_apply_unlimited,
        releases=">=0.24,<0.28",
        platforms=("cpu",),
        why="an adapter that is read again for its requests may take more memory than "
        "VLLM_MOE_LORA_MEMORY allows; a refusal would stop the engine",
        upstream="",
        until="0.29, where the hooks of safe-loading keep such an adapter",
    ),
    Hook(
        feature="safe-loading",
        target=f"{_FILE}:LRUCacheWorkerLoRAManager.add_adapter",
        make=_add_adapter,
        releases=">=0.29,<0.34",
        why="an adapter is read and packed on the thread that runs the model, so no request gets a "
        "token meanwhile",
        upstream="",
        until="upstream reads adapters in a thread of their own",
    ),
)
