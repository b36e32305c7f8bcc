"""vllm/model_executor/layers/fused_moe/oracle/int_wna16.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.int_wna16"
_QUANT = "vllm.model_executor.layers.quantization"


def _backends(original: Callable[..., Any]) -> Callable[..., Any]:
    def backend_to_kernel_cls(backend: Any) -> Any:
        from ..layers.cpu.subclasses import with_lora

        # The twins say no where LoRA is off, so upstream's class is then chosen as ever.
        classes = original(backend)
        return [twin for twin in map(with_lora, classes) if twin is not None] + classes

    return backend_to_kernel_cls


def _make_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    def make_wna16_moe_kernel(
        moe_quant_config: Any, moe_config: Any, experts_cls: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from ..layers.cpu.subclasses import upstream_of

        plain = upstream_of(experts_cls)
        if plain is None:
            return original(moe_quant_config, moe_config, experts_cls, *args, **kwargs)
        # Upstream checks the class by identity before it builds it: let it build its own, then
        # build the kernel again around the twin.
        kernel = original(moe_quant_config, moe_config, plain, *args, **kwargs)
        experts = experts_cls(moe_config=moe_config, quant_config=moe_quant_config)
        return type(kernel)(kernel.prepare_finalize, experts)

    return make_wna16_moe_kernel


def _names(name: str) -> tuple[str, ...]:
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
        why="no CPU experts class takes LoRA, so with LoRA on an INT4 MoE model does not load: "
        "No WNA16 MoE backend supports the deployment configuration",
        **_COMMON,
    ),
    Hook(
        target=f"{_ORACLE}:make_wna16_moe_kernel",
        make=_make_kernel,
        also=_names("make_wna16_moe_kernel"),
        why="it asserts that the experts class is one of upstream's own",
        **_COMMON,
    ),
)
