"""The LoRA-capable twin of each upstream CPU experts class, and how a backend choice gets one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..without_lora import lora_off
from .int4 import Int4CPUExperts
from .unquantized import WidenedCPUExperts


@functools.cache
def with_lora(experts_cls: type[Any]) -> type[Any] | None:
    """A subclass of ``experts_cls`` that takes LoRA, or None where there is no way yet.

    The subclass keeps upstream's name with a suffix, so vLLM's own log lines stay readable.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

    for base, mixin in (
        (cpu_moe.CPUUnquantizedExperts, WidenedCPUExperts),
        (cpu_moe.CPUExpertsInt4, Int4CPUExperts),
    ):
        if issubclass(experts_cls, base):
            # LoRAExpertsMixin is what FusedMoEWithLoRA.set_mapping asks for by isinstance.
            bases = (mixin, experts_cls, LoRAExpertsMixin)
            name = f"{experts_cls.__name__}WithLoRA"
            return type(name, bases, {"__module__": __name__, "upstream_cls": experts_cls})
    return None


def upstream_of(experts_cls: type[Any]) -> type[Any] | None:
    """The upstream class of a twin, None for any other class."""
    return getattr(experts_cls, "upstream_cls", None)


def lora_choice(
    choose: Callable[..., tuple[Any, type[Any] | None]], config: Any, *args: Any, **kwargs: Any
) -> tuple[Any, type[Any] | None]:
    """Make upstream's backend choice as if LoRA were off and return the class's LoRA twin.

    Args:
        choose: upstream's select function; called with ``args`` and ``kwargs``.
        config: the layer's `FusedMoEConfig`; `is_lora_enabled` is off during the choice only.

    Raises:
        NotImplementedError: the chosen experts class has no LoRA twin.
    """
    with lora_off(config):
        backend, experts_cls = choose(*args, **kwargs)
    twin = None if experts_cls is None else with_lora(experts_cls)  # type: ignore[arg-type]
    if twin is None:
        name = getattr(experts_cls, "__name__", backend)
        raise NotImplementedError(
            f"vLLM chose the CPU MoE experts {name}, which cannot take LoRA. Serve a bf16, fp16, "
            "fp32, GPTQ or compressed-tensors INT4 version of the model, or leave out "
            "--enable-lora."
        )
    return backend, twin
