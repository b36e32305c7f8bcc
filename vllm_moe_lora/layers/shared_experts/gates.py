"""Gates that are torch's own Linear modules (up to vLLM 0.13), which LoRA cannot wrap."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def as_vllm_linear(model: nn.Module, names: Collection[str]) -> int:
    """Turn torch's own Linear modules called ``names`` into vLLM's, which LoRA can wrap.

    The weight is the same parameter, the result the same tensor; every reference is replaced.

    Returns:
        The number of modules that were replaced.
    """
    from vllm.model_executor.layers.linear import ReplicatedLinear

    found = {
        id(child): child
        for parent in model.modules()
        for name, child in parent._modules.items()
        if name in names and type(child) is nn.Linear
    }
    made = {}
    for key, old in found.items():
        new = ReplicatedLinear(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            params_dtype=old.weight.dtype,
            return_bias=False,
        )
        new.weight, new.bias = old.weight, old.bias
        new.quant_method.process_weights_after_loading(new)
        made[key] = new
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    return len(made)
