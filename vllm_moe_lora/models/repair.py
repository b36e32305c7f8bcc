"""Repairs LoRA layers that vLLM made for modules which it did not have in mind.

vLLM's kernels for GPUs assert that the input of a LoRA layer has the dtype of the adapters. A gate
that is called with fp32 in a bf16 model trips it with each request, whether the adapter has LoRA on
the gate or not.

vLLM's LoRA layer for merged q, k and v takes the size of v for that of k. In MiMo-V2 heads of v are
smaller. LoRA on v then has a slot of the wrong size, and its rows end behind those of the output.

Ernie 4.5 VL has experts for text and experts for images. In a step with both, each get their rows
of the batch only, as do the shared experts and the gates. LoRA there would take the adapters of the
first rows of the batch. And vLLM's manager takes only routed experts that are called "experts", as
transformers calls them in this model, too: `text_moe.experts` and `vision_moe.experts`.

Up to vLLM 0.24 the model's class must have `get_expert_mapping`, or the engine does not start with
LoRA. Granite, Llama 4, MiniCPM and others lack it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .declare import ATTRIBUTE
from .row import Row, ends_of


def expert_mapping(model: Any) -> int:
    """Give a MoE model without `get_expert_mapping` one that names the parts of its experts.

    vLLM's LoRA manager takes from it how many experts there are, and what their parts are called.
    Adapters are read by this package, which knows other names, too.

    Args:
        model: vLLM's model, before its modules are wrapped.

    Returns:
        The number of experts in a layer, or 0 if nothing was changed.
    """
    from vllm.model_executor.utils import get_moe_expert_mapping

    configs = [getattr(module, "moe_config", None) for module in model.modules()]
    count: int = max((config.num_experts for config in configs if config is not None), default=0)
    if not count:
        return 0
    with contextlib.suppress(ValueError):  # vLLM 0.25 and later, if no module has it
        if get_moe_expert_mapping(model):
            return 0
    parts = (("w13", "gate_proj", "w1"), ("w2", "down_proj", "w2"), ("w13", "up_proj", "w3"))
    found = [
        (f"experts.{weight}_", f"experts.{number}.{name}.", number, shard)
        for number in range(count)
        for weight, name, shard in parts
    ]
    model.get_expert_mapping = lambda: found
    return count


def cast_inputs(model: Any, wrappers: dict[str, Any]) -> list[str]:
    """Compute LoRA on the modules in `Row.cast_inputs` in the adapters' dtype.

    The module itself still gets the input as it is, and LoRA is added to its output as it is.

    Args:
        model: vLLM's model; nothing is done without its row.
        wrappers: name -> LoRA layer (`LoRAModelManager.modules`). Each already has its
            ``punica_wrapper``, which is replaced.

    Returns:
        The names of the LoRA layers that were changed.
    """
    row: Row | None = getattr(model, ATTRIBUTE, None)
    if row is None or not row.cast_inputs:
        return []
    found = [name for name in wrappers if not set(row.cast_inputs).isdisjoint(ends_of(name))]
    for name in found:
        wrappers[name].punica_wrapper = _Casting(wrappers[name].punica_wrapper)
    return found


class _Casting:
    """A punica wrapper that casts the input of a linear layer before LoRA is computed."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def add_lora_linear(self, y: Any, x: Any, lora_a: Any, *args: Any, **more: Any) -> Any:
        """As vLLM's, for ``x`` [tokens, in] of any dtype."""
        return self._inner.add_lora_linear(y, x.to(lora_a[0].dtype), lora_a, *args, **more)


def resize_v(manager: Any) -> list[str]:
    """Give LoRA on merged q, k and v the size of v, where heads of v differ from those of k.

    Args:
        manager: vLLM's `LoRAModelManager`, whose modules have just been wrapped. The slots of these
            LoRA layers are allocated again, so none may have been written yet.

    Returns:
        The names of the LoRA layers that were changed.
    """
    found = []
    for name, wrapper in manager.modules.items():
        base = getattr(wrapper, "base_layer", None)
        slices: tuple[int, ...] = getattr(wrapper, "output_slices", ())
        size, heads = getattr(base, "v_head_size", None), getattr(base, "num_kv_heads", None)
        if size is None or heads is None or len(slices) != 3 or slices[2] == heads * size:
            continue
        wrapper.output_slices = (*slices[:2], heads * size)
        wrapper.create_lora_weights(manager.lora_slots, manager.lora_config, manager.model.config)
        found.append(name)
    return found


def rename(model: Any) -> list[str]:
    """Give parts of the modules in `Row.whole_batches` the names in `Row.renamed`.

    The module's own `forward` still finds them under their old names.

    Args:
        model: vLLM's model with its weights, before its modules are wrapped; nothing is done
            without its row.

    Returns:
        The names of the modules that were changed.
    """
    row: Row | None = getattr(model, ATTRIBUTE, None)
    found = []
    for name, module in _splitting(model, row):
        assert row is not None
        # A layer without experts of a kind has an MLP of that name, and no gate.
        if not row.renamed.keys() <= module._modules.keys():
            continue
        for old, new in row.renamed.items():
            parent, _, own = new.partition(".")
            if parent not in module._modules:
                module.add_module(parent, torch.nn.Module())
            module._modules[parent].add_module(own, module._modules.pop(old))
        module.forward = functools.partial(type(module).forward, _OldNames(module, row.renamed))
        found.append(name)
    return found


class _OldNames:
    """A module whose parts are also found under the names that they had."""

    def __init__(self, module: Any, renamed: Mapping[str, str]) -> None:
        self._module, self._renamed = module, renamed

    def __getattr__(self, name: str) -> Any:
        new = self._renamed.get(name)
        return getattr(self._module, name) if new is None else self._module.get_submodule(new)


def whole_batches(model: Any) -> list[str]:
    """Give modules that split a batch all its rows twice, and take each row's result.

    Args:
        model: vLLM's model; nothing is done without its row.

    Returns:
        The names of the modules that were changed. They take ``hidden_states`` [tokens, hidden] and
        ``visual_token_mask`` [tokens, 1], which is None without images.
    """
    found = _splitting(model, getattr(model, ATTRIBUTE, None))
    for _, module in found:
        module.forward = _on_all_rows(module.forward)
    return [name for name, _ in found]


def _splitting(model: Any, row: Row | None) -> list[tuple[str, Any]]:
    """The modules in `Row.whole_batches`, by name."""
    if row is None or not row.whole_batches:
        return []
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ == row.whole_batches]


def _on_all_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Any, visual_token_mask: Any, **more: Any) -> Any:
        mask = visual_token_mask
        if mask is None or mask.all() or not mask.any():
            return original(hidden_states, mask, **more)
        of_images = mask.bool()
        text = original(hidden_states.clone(), None, **more)
        images = original(hidden_states, of_images.new_ones(of_images.shape), **more)
        return text.where(~of_images.view(-1, 1), images)

    return forward
