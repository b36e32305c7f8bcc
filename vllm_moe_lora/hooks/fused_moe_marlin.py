"""vllm/model_executor/layers/fused_moe/fused_marlin_moe.py: AWQ's zero points.

From 0.21 on the file is experts/marlin_moe.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.model_executor.layers.fused_moe"


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers.quantised import marlin_zero_points

        with marlin_zero_points.passing(self):
            return original(self, *args, **more)

    return apply


def _fused_marlin_moe(original: Callable[..., Any]) -> Callable[..., Any]:
    def fused_marlin_moe(*args: Any, **more: Any) -> Any:
        from ..layers.quantised import marlin_zero_points

        return original(*args, **{**more, **marlin_zero_points.arguments()})

    return fused_marlin_moe


def _quant_type_id(original: Any) -> property:
    def quant_type_id(self: Any) -> int:
        from ..layers.quantised import marlin_zero_points

        if marlin_zero_points.has_zero_points(self):
            return marlin_zero_points.quant_type_id()
        return int(original.__get__(self))

    return property(quant_type_id)


def _hooks(file: str, releases: str) -> list[Hook]:
    common: dict[str, Any] = {
        "feature": "quantised-experts",
        "releases": releases,
        "why": "with LoRA, AWQ layers run MarlinExperts, which ignores the zero points of their "
        "weights, so even requests without an adapter get wrong answers",
        "upstream": "https://github.com/vllm-project/vllm/blob/v0.22.0/vllm/model_executor/layers/"
        "fused_moe/experts/marlin_moe.py",
        "until": "0.22, where MarlinExperts supports zero points",
        "layers": True,
    }
    makes: dict[str, Callable[[Any], Any]] = {
        "MarlinExperts.apply": _apply,
        "MarlinExperts.quant_type_id": _quant_type_id,
        "fused_marlin_moe": _fused_marlin_moe,
    }
    return [Hook(target=f"{file}:{name}", make=make, **common) for name, make in makes.items()]


HOOKS = (
    *_hooks(f"{_FILE}.fused_marlin_moe", ">=0.11.1,<0.21"),
    *_hooks(f"{_FILE}.experts.marlin_moe", ">=0.21,<0.22"),
)
