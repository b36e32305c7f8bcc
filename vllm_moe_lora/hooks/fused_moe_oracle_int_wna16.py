"""vllm/model_executor/layers/fused_moe/oracle/int_wna16.py: INT4 experts with LoRA on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.int_wna16"
_QUANT = "vllm.model_executor.layers.quantization"


def _backends(original: Callable[..., Any]) -> Callable[..., Any]:
    def backend_to_kernel_cls(backend: Any) -> Any:
        from ..layers.cpu.subclasses import with_lora

        # Upstream takes the first class that supports the layer. Our subclasses come first, but
        # support a layer only if LoRA is on.
        classes = original(backend)
        return [one for one in map(with_lora, classes) if one is not None] + classes

    return backend_to_kernel_cls


def _make_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    def make_wna16_moe_kernel(
        moe_quant_config: Any, moe_config: Any, experts_cls: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from ..layers.cpu.subclasses import upstream_of

        upstream_cls = upstream_of(experts_cls)
        if upstream_cls is None:
            return original(moe_quant_config, moe_config, experts_cls, *args, **kwargs)
        # Upstream's function asserts that it knows the class. So let it make a kernel with its own
        # class, and then make that kernel again with the subclass.
        kernel = original(moe_quant_config, moe_config, upstream_cls, *args, **kwargs)
        experts = experts_cls(moe_config=moe_config, quant_config=moe_quant_config)
        return type(kernel)(kernel.prepare_finalize, experts)

    return make_wna16_moe_kernel


def _copies(name: str) -> tuple[str, ...]:
    """Return the targets of the modules that import the function by its name."""
    modules = (
        "auto_gptq",
        "auto_awq",
        "moe_wna16",
        "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16",
    )
    return tuple(f"{_QUANT}.{module}:{name}" for module in modules)


_COMMON: dict[str, Any] = {
    "feature": "cpu-int4-experts",
    "releases": ">=0.30,<0.34",
    "platforms": ("cpu",),
    "upstream": "https://github.com/vllm-project/vllm/issues/29424",
    "until": "upstream's CPUExpertsInt4 supports LoRA",
}

HOOKS = (
    Hook(
        target=f"{_ORACLE}:backend_to_kernel_cls",
        make=_backends,
        why="no CPU experts class supports LoRA, so an INT4 MoE model does not load with "
        "--enable-lora: No WNA16 MoE backend supports the deployment configuration",
        **_COMMON,
    ),
    Hook(
        target=f"{_ORACLE}:make_wna16_moe_kernel",
        make=_make_kernel,
        also=_copies("make_wna16_moe_kernel"),
        why="it asserts that the experts class is one of upstream's own, so it refuses a subclass "
        "that supports LoRA",
        **_COMMON,
    ),
)
