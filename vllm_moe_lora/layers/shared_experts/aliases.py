"""One LoRA layer for each wrapped module, whatever name the model reaches the module by.

vLLM's `LoRAModelManager` replaces a module by a LoRA layer under the first name that LoRA may
target. The model may hold the same module under a second name: `mlp.shared_expert_gate` is also
`mlp.shared_expert.expert_gate`, and `mlp.gate` is also `gate` of the MoE runner. If the forward
pass uses the second name, it runs the module without LoRA, and no message says so.
"""

from __future__ import annotations

from torch import nn


def rewire(model: nn.Module, wrappers: dict[str, nn.Module]) -> list[str]:
    """Point every reference to a wrapped module at the module's LoRA layer.

    Args:
        model: the whole model; it is changed.
        wrappers: name -> LoRA layer, which has the wrapped module as ``base_layer``
            (`LoRAModelManager.modules`).

    Returns:
        The names that now lead to the LoRA layer, for the log.
    """
    by_base = _by_base(wrappers)
    own = {id(wrapper) for wrapper in by_base.values()}
    moved = []
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():
            # The child is the bare module, or a second LoRA layer around it.
            wrapper = by_base.get(id(child)) or by_base.get(id(getattr(child, "base_layer", None)))
            if wrapper is None or wrapper is parent or id(child) in own:
                continue
            parent._modules[name] = wrapper
            moved.append(f"{parent_name}.{name}")
    return moved


def drop_duplicates(wrappers: dict[str, nn.Module]) -> list[str]:
    """Remove all entries of ``wrappers`` that belong to a module which an earlier entry has.

    An adapter has weights under the first name only. vLLM resets the slot for each name without
    weights, so a second name of the same module would erase them.

    Args:
        wrappers: as in `rewire`; it is changed.

    Returns:
        The names that were removed.
    """
    first: dict[int, str] = {}
    for name, one in wrappers.items():
        first.setdefault(_base_id(one), name)
    again = [name for name, one in wrappers.items() if first[_base_id(one)] != name]
    for name in again:
        del wrappers[name]
    return again


def unwrapped_references(model: nn.Module, wrappers: dict[str, nn.Module]) -> dict[str, str]:
    """Find wrapped modules that an attention backend still uses without LoRA.

    Attention backends (``impl`` of vLLM's attention layers) are plain objects, so `rewire` does not
    find their references. MLA's backend holds `kv_b_proj`. It multiplies that weight into the query
    and output projections when the model is loaded, so a LoRA layer around it has no effect.

    Args:
        model, wrappers: as in `rewire`.

    Returns:
        Name of the LoRA layer -> the attribute that holds the bare module.
    """
    by_base = _by_base(wrappers)
    names = {id(wrapper): name for name, wrapper in wrappers.items()}
    found: dict[str, str] = {}
    for owner_name, owner in model.named_modules():
        holder = vars(owner).get("impl")
        if holder is None or not hasattr(holder, "__dict__"):
            continue
        for key, value in vars(holder).items():
            wrapper = by_base.get(id(value))
            if wrapper is not None:
                where = f"{owner_name}.impl.{key} ({type(holder).__name__})"
                found.setdefault(names[id(wrapper)], where)
    return found


def _by_base(wrappers: dict[str, nn.Module]) -> dict[int, nn.Module]:
    """Return id of the wrapped module -> its first LoRA layer."""
    return {id(w.base_layer): w for w in reversed(wrappers.values()) if hasattr(w, "base_layer")}


def _base_id(wrapper: nn.Module) -> int:
    return id(getattr(wrapper, "base_layer", wrapper))
