"""vllm/lora/punica_wrapper/punica_cpu.py: LoRA on the dense layers of a MoE model, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_CLASS = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"


def serves_moe(wrapper: Any) -> bool:
    """Return whether a punica wrapper belongs to a MoE model. Others keep upstream's functions.

    hooks/lora_model_manager.py sets the attribute.
    """
    return bool(getattr(wrapper, "moe_lora", False))


def _update_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if serves_moe(self):
            from ..kernels.cpu_dense import row_segments

            # token_segments is also read by layers/cpu/experts.py.
            self.token_segments = row_segments(self.token_lora_indices)
            self.sampler_segments = row_segments(self.sampler_indices)
            if hasattr(self, "token_mapping_meta"):  # with data parallelism, from experts.py
                self.token_mapping_meta.update(self.token_lora_indices)

    return update_metadata


def _add_lora_linear(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora_linear(
        self: Any,
        y: Any,
        x: Any,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        if not serves_moe(self):
            return original(
                self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs
            )
        from ..kernels.cpu_dense import add_lora

        y2, x2 = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        segments = self.token_segments
        add_lora(y2, x2, lora_a_stacked, lora_b_stacked, segments, scale, output_slices)
        return None

    return add_lora_linear


def _add_lora_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora_logits(
        self: Any, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, **kw: Any
    ) -> None:
        if not serves_moe(self):
            return original(self, y, x, lora_a_stacked, lora_b_stacked, scale, **kw)
        from ..kernels.cpu_dense import add_lora

        y2, x2 = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        a, b, segments = (lora_a_stacked,), (lora_b_stacked,), self.sampler_segments
        add_lora(y2, x2, a, b, segments, scale, (y2.shape[1],))
        return None

    return add_lora_logits


def _add_lora_embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora_embedding(
        self: Any, y: Any, x: Any, lora_b_stacked: Any, *rest: Any, **kw: Any
    ) -> None:
        if not serves_moe(self):
            return original(self, y, x, lora_b_stacked, *rest, **kw)
        from ..kernels.cpu_dense import add_expanded

        y2, x2 = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        add_expanded(y2, x2, lora_b_stacked, self.token_segments)
        return None

    return add_lora_embedding


_COMMON: dict[str, Any] = {
    "feature": "cpu-dense-lora",
    "releases": ">=0.11.1,<0.34",
    "platforms": ("cpu",),
    "layers": True,
    "upstream": "",
    "until": "upstream's torch_ops do not copy the factors for every token",
    "why": "up to 0.32 a request without an adapter, in a batch with adapters, gets the adapter of "
    "the last slot on attention, gates and shared experts, because upstream indexes the factors "
    "with -1. Upstream 0.33 fixes that; what remains is speed: all releases copy both factors once "
    "for every token. The hook changes MoE models only",
}

HOOKS = (
    Hook(target=f"{_CLASS}.update_metadata", make=_update_metadata, **_COMMON),
    Hook(target=f"{_CLASS}.add_lora_linear", make=_add_lora_linear, **_COMMON),
    Hook(target=f"{_CLASS}.add_lora_embedding", make=_add_lora_embedding, **_COMMON),
    Hook(target=f"{_CLASS}.add_lora_logits", make=_add_lora_logits, **_COMMON),
)
