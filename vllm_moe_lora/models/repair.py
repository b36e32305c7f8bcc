"""Repairs LoRA layers that vLLM made for modules which it did not have in mind.

vLLM's kernels for GPUs assert that the input of a LoRA layer has the dtype of the adapters. A gate
that is called with fp32 in a bf16 model trips it with each request, whether the adapter has LoRA on
the gate or not.

vLLM's LoRA layer for merged q, k and v takes the size of v for that of k. In MiMo-V2 heads of v are
smaller. LoRA on v then has a slot of the wrong size, and its rows end behind those of the output.

Ernie 4.5 VL has experts for text and experts for images. In a step with both, each get their rows
of the batch only, as do the shared experts and the gates. LoRA there would take the adapters of the
first rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .declare import ATTRIBUTE
from .row import Row, ends_of


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


def whole_batches(model: Any) -> list[str]:
    """Give modules that split a batch all its rows twice, and take each row's result.

    Args:
        model: vLLM's model; nothing is done without its row.

    Returns:
        The names of the modules that were changed. They take ``hidden_states`` [tokens, hidden] and
        ``visual_token_mask`` [tokens, 1], which is None without images.
    """
    row: Row | None = getattr(model, ATTRIBUTE, None)
    if row is None or not row.whole_batches:
        return []
    found = [n for n, m in model.named_modules() if type(m).__name__ == row.whole_batches]
    for name in found:
        module = model.get_submodule(name)
        module.forward = _on_all_rows(module.forward)
    return found


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
