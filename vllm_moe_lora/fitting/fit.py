"""Fits a loaded adapter to the model, or raises an error before anything in the engine changes.

Module names are changed to the model's own, every tensor is checked, and the tensors of routed
experts are staged: built in the form that a slot of the LoRA layer takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..adapters import modalities
from ..adapters.canonical import Dims, Experts
from ..adapters.config import Config
from ..adapters.errors import AdapterError, listed, prefixed
from ..adapters.group import Tensors
from ..adapters.layouts.recognise import resolve
from ..adapters.spelling import Spellings
from ..kernels.writable_slots import WritableSlots
from ..log import get_logger
from ..targets import supports_lora
from . import budget, merged_projections, moved, strict
from .again import are_views, once
from .memory import PausedGC
from .moe_layers import dims_of, for_set_lora, is_experts, serves_moe, slots_of
from .stage import stage

logger = get_logger(__name__)


@dataclass
class PendingExperts:
    """Tensors of routed experts that were read but not yet fitted to the model.

    They are the attribute ``moe_lora`` of vLLM's `LoRAModel`, between `read.read` and `fit`.

    Attributes:
        layers: what the adapter calls a layer's experts -> their tensors.
        mapped: the same name -> that name after vLLM's weights mapper.
        config: the adapter's.
        paused_gc: keeps the garbage collector off until `fit` has run.
        refused: the error with which vLLM refused the adapter's names; None if it did not.
        tensors: all tensors of the adapter. Only those of `KeptTensors` are looked at again.
    """

    layers: dict[str, Tensors]
    mapped: dict[str, str]
    config: Config
    paused_gc: PausedGC
    refused: ValueError | None = None
    tensors: dict[str, Any] = field(default_factory=dict)


def fit(manager: Any, lora: Any) -> None:
    """Change an adapter's module names to the model's, check it, and stage its routed experts.

    A second call for the same ``lora`` does nothing.

    Args:
        manager: vLLM's `LoRAModelManager`. Its modules are already wrapped in LoRA layers.
        lora: a `LoRAModel` that vLLM has not packed yet. The staged experts go into ``lora.loras``
            under the name of the LoRA layer, in the form that the layer's `set_lora` takes.

    Raises:
        AdapterError: a tensor has no module in the model, or does not fit it. Then nothing has
            changed except ``lora``.
    """
    if getattr(lora, "moe_lora_fitted", False):
        return
    lora.moe_lora_fitted = True
    pending: PendingExperts | None = getattr(lora, "moe_lora", None)
    given = pending is not None or hasattr(lora, "moe_lora_objection")
    if not given and strict.is_warm_up(lora):
        return _stage_warm_up(manager, lora)
    try:
        with prefixed(lora.id):
            _fit(manager, lora, pending)
    finally:
        if pending is not None:
            pending.paused_gc.release()
    return None


def _stage_warm_up(manager: Any, lora: Any) -> None:
    """Replace the experts of vLLM's warm-up adapter by zeros for the experts on this device.

    They are left out where a slot takes memory only for what an adapter has: pages are for adapters
    (GPU), and the experts' weights would be widened for nothing (CPU).

    Upstream needs something in an adapter, so one layer stays if there is nothing else.

    If gate and up are fused, the warm-up adapter of vLLM up to 0.32 holds only the experts of one
    device, but vLLM then splits it by the number of all experts.
    """
    staged, left_out = {}, []
    for name, wrapper in manager.modules.items():
        if not is_experts(wrapper):
            continue
        fused = lora.loras.pop(f"{name}.base_layer", None) is not None
        stacks = getattr(wrapper, "w13_lora_a_stacked", ())
        if any(isinstance(one, WritableSlots) for one in stacks):
            lora.loras.pop(name, None)
            left_out.append(name)
        elif fused:
            staged[name] = _nothing(manager, name)
    if left_out and not lora.loras:
        staged[left_out[0]] = _nothing(manager, left_out[0])
    _put_staged(manager, lora, staged)


def _nothing(manager: Any, name: str) -> Any:
    """Return zeros for the LoRA layer ``name``, in the form that its `set_lora` takes."""
    wrapper = manager.modules[name]
    nothing = stage(Experts(name, "warm-up"), slots_of(manager, wrapper))
    return for_set_lora(manager, wrapper, nothing)


def _fit(manager: Any, lora: Any, pending: PendingExperts | None) -> None:
    if pending is not None and pending.refused is not None and not serves_moe(manager):
        raise pending.refused
    objection = getattr(lora, "moe_lora_objection", None)
    if objection is not None and serves_moe(manager):
        raise objection
    shapes = strict.module_shapes(manager)
    spellings = Spellings(shapes)
    for name in [name for name in lora.loras if name not in shapes]:
        own = spellings.find(name)
        if own is not None and own in lora.loras:
            raise AdapterError(
                f"{name} and {own} are the same module of the model. Keep one of them."
            )
        if own is not None:
            lora.loras[own] = lora.loras.pop(name)
            lora.loras[own].module_name = own
    strict.check(manager, lora, shapes)
    merged_projections.merge(manager, lora)
    if pending is None:
        return
    wrappers = {name: m for name, m in manager.modules.items() if is_experts(m)}
    if modalities.has_kinds(wrappers):
        _split_kinds(pending, dims_of(manager, next(iter(wrappers.values()))).experts)
    fitted = _match_layers(manager, pending, wrappers)
    for name in fitted.values():
        supports_lora.check_adapter(name, wrappers[name])
    if fitted:
        resolved, notes = _by_dims(
            manager, pending, {p: wrappers[own] for p, own in fitted.items()}
        )
        staged, limit, size = {}, budget.budget_of(manager), 0
        for count, found in enumerate(resolved, start=1):
            wrapper = wrappers[fitted[found.prefix]]
            tensors = stage(found, slots_of(manager, wrapper))
            if limit is not None:
                size = limit.with_layer(size, tensors)
                limit.check(limit.expected(size, count, len(resolved)), lora.id)
            staged[fitted[found.prefix]] = for_set_lora(manager, wrapper, tensors)
        for note in notes:
            logger.warning("LoRA adapter %d: %s", lora.id, note)
        logger.debug("LoRA adapter %d: %s", lora.id, {found.layout for found in resolved})
        if limit is not None:
            limit.add(lora, size)
        _put_staged(manager, lora, staged)
    if not lora.loras:
        raise AdapterError("none of its tensors is for this model. Was it trained on another one?")
    del lora.moe_lora  # frees the views of the file


def _resolved(
    pending: PendingExperts, layers: dict[str, Tensors], dims: Dims
) -> tuple[list[Experts], list[str]]:
    """See `recognise.resolve`. Of tensors that are kept it is done for the first version only."""
    return once(
        pending.tensors,
        ("resolved", tuple(layers), dims),
        lambda: resolve(layers, dims, pending.config),
        lambda made: are_views(made[0], pending.tensors),
    )


def _by_dims(
    manager: Any, pending: PendingExperts, wrappers: dict[str, Any]
) -> tuple[list[Experts], list[str]]:
    """As `_resolved`, for ``wrappers``: what the adapter calls a layer's experts -> its LoRA layer.

    Only experts for text and experts for images differ in size.
    """
    by_dims: dict[Dims, dict[str, Tensors]] = {}
    for prefix, wrapper in wrappers.items():
        layers = by_dims.setdefault(dims_of(manager, wrapper), {})
        layers[prefix] = pending.layers[prefix]
    experts, notes = [], []
    for dims, layers in by_dims.items():
        found, more = _resolved(pending, layers, dims)
        experts += found
        notes += more
    return experts, notes


def _split_kinds(pending: PendingExperts, count: int) -> None:
    """Give the experts of each kind a name of their own; see `modalities.split`."""
    parts, mapped = modalities.split(pending.layers, count), {}
    for prefix, (given, _) in parts.items():
        own = prefix.removeprefix(given.removesuffix("experts")) if prefix != given else "experts"
        mapped[prefix] = pending.mapped[given].removesuffix("experts") + own
    pending.layers = {prefix: tensors for prefix, (_, tensors) in parts.items()}
    pending.mapped = mapped


def _match_layers(
    manager: Any, pending: PendingExperts, wrappers: dict[str, Any]
) -> dict[str, str]:
    """What the adapter calls a layer's experts -> name of the model's LoRA layer.

    With pipeline parallelism, layers on other devices are left out.
    """
    spellings = Spellings(wrappers)
    fitted: dict[str, str] = {}
    lost = []
    for prefix, mapped in pending.mapped.items():
        own = spellings.find(mapped)
        if own is None:
            lost.append(prefix)
        elif own in fitted.values():
            other = next(name for name, layer in fitted.items() if layer == own)
            raise AdapterError(
                f"{prefix} and {other} are the same layer of the model, {own}. Keep one of them."
            )
        else:
            fitted[prefix] = own
    if not lost or strict.is_pipeline_parallel():
        return fitted
    if not wrappers:
        raise AdapterError(
            f"it has LoRA on routed experts ({listed(lost)}), but this model has no routed experts "
            "that take LoRA. Nothing was loaded."
        )
    raise AdapterError(
        f"no routed experts of this model are called {listed(lost)}. Nothing was loaded. The "
        f"model's routed experts are {listed(wrappers)}."
    )


def _put_staged(manager: Any, lora: Any, staged: dict[str, Any]) -> None:
    """Put staged tensors into ``lora.loras``, where vLLM finds them at activation."""
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    for name, (a, b) in staged.items():
        rank = max(one.shape[-2] for one in a)
        wrapper = manager.modules[name]
        if supports_lora.has_eplb(wrapper):
            lora.loras[name] = moved.weights(manager, name, wrapper, rank, (a, b))
            continue
        ones = [1.0] * len(a)
        lora.loras[name] = PackedLoRALayerWeights(name, rank, list(ones), a, b, scaling=ones)
