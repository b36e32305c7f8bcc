"""vllm/distributed/eplb/eplb_state.py: moves experts between devices (--enable-eplb)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.distributed.eplb.eplb_state"


def _commit_all(original: Callable[..., Any]) -> Callable[..., Any]:
    def _commit_eplb_maps(model_state: Any, *args: Any, **more: Any) -> None:
        from ..fitting import moved

        original(model_state, *args, **more)
        for layer in model_state.model.moe_layers:
            moved.write_slots(layer)

    return _commit_eplb_maps


def _commit_one(original: Callable[..., Any]) -> Callable[..., Any]:
    def _commit_eplb_maps_for_layer(
        model_state: Any, new_physical_to_logical_map: Any, layer: int
    ) -> None:
        from ..fitting import moved

        original(model_state, new_physical_to_logical_map, layer)
        moved.write_slots(model_state.model.moe_layers[layer])

    return _commit_eplb_maps_for_layer


_MOVED: dict[str, Any] = {
    "feature": "parallel-experts",
    "releases": ">=0.30,<0.34",
    "layers": True,
    "why": "--enable-eplb moves the weights of experts to other devices between two steps, but "
    "leaves their LoRA factors where they are, so answers are silently wrong",
    "upstream": "",
    "until": "upstream moves the factors with the experts",
}

HOOKS = (
    Hook(target=f"{_FILE}:_commit_eplb_maps", make=_commit_all, **_MOVED),
    Hook(target=f"{_FILE}:_commit_eplb_maps_for_layer", make=_commit_one, **_MOVED),
)
