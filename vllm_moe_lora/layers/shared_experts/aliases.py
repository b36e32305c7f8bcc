"""One module, one LoRA wrapper, whatever names the model knows it by.

vLLM wraps a module under the first name that LoRA may target. The same module is often reachable
by other names (`mlp.shared_expert_gate` is also `mlp.shared_expert.expert_gate`, `mlp.gate` is
also the MoE runner's `gate`), and the forward pass may use one of those: its LoRA would be
silently ignored.
"""

from __future__ import annotations

from torch import nn


def rewire(model: nn.Module, wrappers: dict[str, nn.Module]) -> list[str]:
    """Point every reference to a wrapped module at its wrapper.

    Args:
        model: the whole model.
        wrappers: name -> LoRA layer with the wrapped module as ``base_layer``
            (`LoRAModelManager.modules`).

    Returns:
        The names that were pointed elsewhere, for the log.
    """
    by_base = _by_base(wrappers)
    own = {id(wrapper) for wrapper in by_base.values()}
    moved = []
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():
            # A raw reference, or one to a second wrapper of the module.
            wrapper = by_base.get(id(child)) or by_base.get(id(getattr(child, "base_layer", None)))
            if wrapper is None or wrapper is parent or id(child) in own:
                continue
            parent._modules[name] = wrapper
            moved.append(f"{parent_name}.{name}")
    return moved


def once(wrappers: dict[str, nn.Module]) -> list[str]:
    """Drop further names and further wrappers of one module from ``wrappers``; returns the names.

    An adapter has weights under the first name only, and each further one would reset them.
    """
    first: dict[int, str] = {}
    for name, one in wrappers.items():
        first.setdefault(_inside(one), name)
    again = [name for name, one in wrappers.items() if first[_inside(one)] != name]
    for name in again:
        del wrappers[name]
    return again


def raw_references(model: nn.Module, wrappers: dict[str, nn.Module]) -> dict[str, str]:
    """Wrapped modules that some plain object still calls unwrapped: name -> who holds it.

    Attention implementations are plain objects; MLA's keeps `kv_b_proj` and multiplies its weight
    into the query and output projections once, at load, so a wrapper cannot reach it.
    """
    by_base = _by_base(wrappers)
    names = {id(wrapper): name for name, wrapper in wrappers.items()}
    found: dict[str, str] = {}
    for owner_name, owner in model.named_modules():
        holder = vars(owner).get("impl")  # vLLM's attention layers keep their backend there
        if holder is None or not hasattr(holder, "__dict__"):
            continue
        for key, value in vars(holder).items():
            wrapper = by_base.get(id(value))
            if wrapper is not None:
                where = f"{owner_name}.impl.{key} ({type(holder).__name__})"
                found.setdefault(names[id(wrapper)], where)
    return found


def _by_base(wrappers: dict[str, nn.Module]) -> dict[int, nn.Module]:
    """Wrapped module -> its first wrapper."""
    return {id(w.base_layer): w for w in reversed(wrappers.values()) if hasattr(w, "base_layer")}


def _inside(wrapper: nn.Module) -> int:
    return id(getattr(wrapper, "base_layer", wrapper))
