"""Replaces gates that are torch.nn.Linear by vLLM's linear layers, which LoRA can wrap.

Up to vLLM 0.13 the `shared_expert_gate` of Qwen2-MoE and its successors is a torch.nn.Linear. vLLM
has LoRA layers for its own linear layers only, so it refuses an adapter with LoRA on that gate.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def as_vllm_linear(model: nn.Module, names: Collection[str]) -> int:
    """Replace each torch.nn.Linear whose attribute name is in ``names`` by a `ReplicatedLinear`.

    The new module has the same parameters and computes the same result. It is put wherever the
    model has a reference to the old one.

    Args:
        model: the whole model; it is changed.
        names: names of attributes, such as {"shared_expert_gate"}.

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
