"""Whether a model with LoRA is compiled on the CPU (vLLM 0.30 to 0.33).

vLLM's CPU platform switches torch.compile off if LoRA is on, because adapters would become
constants of the compiled code. layers/cpu/operators.py solves that for MoE models. So `keep_mode`
sets the compilation mode again that vLLM chooses without LoRA. Later, when the LoRA layers exist,
`prepare` gives each its operator. If there is a layer without one, the model runs eagerly.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...log import get_logger

logger = get_logger(__name__)

# vLLM's CPU platform sets this option of Inductor if, and only if, it is going to compile.
_PLATFORM_COMPILES = "cpp.dynamic_threads"
# LoRA layers that vLLM calls outside of the compiled model; some releases lack the last two.
_OUTSIDE = {
    "LogitsProcessorWithLoRA",
    "ClassificationHeadWithLoRA",
    "TokenClassificationHeadWithLoRA",
}


def requested(config: Any) -> Any:
    """Return what `keep_mode` has to know of a `VllmConfig` before vLLM's platform changes it."""
    compilation = config.compilation_config
    return compilation.mode, _PLATFORM_COMPILES in compilation.inductor_compile_config


def keep_mode(config: Any, before: Any) -> None:
    """Set the compilation mode to that of an engine without LoRA, if LoRA switched it off.

    Args:
        config: the engine's `VllmConfig`; it is changed.
        before: what `requested` returned before vLLM's ``__post_init__``.
    """
    from vllm.config import CompilationMode

    compilation = config.compilation_config
    if compilation.mode != CompilationMode.NONE or not _ours(config):
        return
    mode, had_option = before
    # vLLM reads the first variable only, and fails with the second, as it does without LoRA.
    disabled = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
    eager = config.model_config.enforce_eager or any(os.environ.get(v) == "1" for v in disabled)
    # A copy of a config, which vLLM makes for a part of a model, has the mode already.
    again = mode == CompilationMode.DYNAMO_TRACE_ONCE
    now = not had_option and _PLATFORM_COMPILES in compilation.inductor_compile_config
    if eager or not (again or now):
        return
    missing = _missing_compiler() if compilation.backend == "inductor" else ""
    if missing:
        logger.warning(
            "The model is not compiled, so it is slower: torch.compile needs %s. Cure: install a "
            "C++ compiler and Python's headers (Debian: g++ and python3-dev), or set "
            "--enforce-eager",
            missing,
        )
        return
    compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE


def _missing_compiler() -> str:
    """Return which file Inductor lacks to compile its C++ code; "" if there is none."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler.split()[0]) is None:
        return f"the C++ compiler {compiler}"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if headers.exists() else str(headers)


def prepare(config: Any, model: Any, manager: Any) -> None:
    """Give each LoRA layer the operator that compiled code calls; or let the model run eagerly.

    Args:
        config: the engine's `VllmConfig`. The layers are added to its ``static_forward_context``.
        model: the whole model, with LoRA layers.
        manager: the `LoRAModelManager`.
    """
    from vllm.config import CompilationMode

    if config.compilation_config.mode == CompilationMode.NONE or not _ours(config):
        return
    found: dict[str, tuple[Any, ...]] = {}
    unknown = [name for name, layer in manager.modules.items() if not _take(name, layer, found)]
    if not unknown:
        config.compilation_config.static_forward_context.update(found)
        logger.info("LoRA of %d layers is compiled into the model, as operators", len(found))
        return
    layer = type(manager.modules[unknown[0]]).__name__
    logger.warning(
        "The model is not compiled, so it is slower: there is no operator for LoRA on %s (%s)",
        unknown[0],
        layer,
    )
    for module in model.modules():
        if hasattr(module, "do_not_compile"):
            module.do_not_compile = True


@contextmanager
def loadable(config: Any) -> Iterator[None]:
    """Let vLLM load a compiled MoE model with LoRA from its cache, inside the block.

    vLLM calls ``finalize_loading`` of what it loads. Its own backend, for GPUs, has that method.
    What torch makes of Inductor's code does not, and there is nothing to finalize.

    Args:
        config: the engine's `VllmConfig`.
    """
    import torch

    if not _ours(config):
        yield
        return
    load = torch.compiler.load_compiled_function

    def load_compiled_function(*args: Any, **more: Any) -> Any:
        loaded = load(*args, **more)
        compiled = loaded._artifacts.compiled_fn  # type: ignore[attr-defined]
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda config: None
        return loaded

    torch.compiler.load_compiled_function = load_compiled_function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compiler.load_compiled_function = load


def _ours(config: Any) -> bool:
    """Return whether an engine runs a MoE model with LoRA on a CPU."""
    from vllm.platforms import current_platform

    if config.lora_config is None or config.model_config is None:
        return False
    return bool(current_platform.is_cpu() and config.model_config.is_moe)


def _take(name: str, layer: Any, found: dict[str, tuple[Any, ...]]) -> bool:
    """Prepare one LoRA layer, and add it to ``found``. Return False if there is no operator."""
    from vllm.lora import layers
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    from ...kernels.native.calls import DenseLora

    # While vLLM runs, their modules may be looked up in what it compiled before.
    from ..gpu import router_weights_on_input  # noqa: F401
    from . import operators
    from .experts import CPULoRAExperts

    key = f"{name}{operators.SUFFIX}"
    if not _OUTSIDE.isdisjoint(kind.__name__ for kind in type(layer).__mro__):
        return True
    if isinstance(layer, layers.FusedMoEWithLoRA):
        experts = layer._moe_kernel.fused_experts
        if not isinstance(experts, CPULoRAExperts):
            return False
        experts.operator_name = key
        found[key] = layer.base_layer.routed_experts, experts
        return True
    dense = isinstance(layer, BaseLinearLayerWithLoRA)
    if dense or isinstance(layer, layers.VocabParallelEmbeddingWithLoRA):
        found[key] = layer, layer.punica_wrapper
        if dense:
            found[key] += (DenseLora(),)
        layer.punica_wrapper = operators.LayerPunica(layer.punica_wrapper, key)
        return True
    return False
