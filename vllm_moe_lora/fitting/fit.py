"""A loaded adapter -> the model it is for, or an error before anything has changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..adapters.canonical import Experts
from ..adapters.config import Config
from ..adapters.errors import AdapterError, about, listed
from ..adapters.group import Tensors
from ..adapters.layouts.recognise import resolve
from ..adapters.spelling import Spellings
from ..log import get_logger
from ..targets import supports_lora
from . import merged_projections, strict
from .memory import NoCollection
from .moe_layers import as_taken, dims_of, is_experts, serves_moe, slots_of
from .stage import stage

logger = get_logger(__name__)


@dataclass
class Pending:
    """Tensors of routed experts that wait for their model. Set as ``LoRAModel.moe_lora``.

    Attributes:
        layers: prefix of a layer's experts, as the adapter calls them -> tensors.
        mapped: that prefix -> what vLLM's weights mapper makes of it.
        config: of the adapter.
        quiet: keeps the garbage collector off meanwhile.
        refused: why upstream did not take the adapter, None where it had no objection.
    """

    layers: dict[str, Tensors]
    mapped: dict[str, str]
    config: Config
    quiet: NoCollection
    refused: ValueError | None = None


def fit(manager: Any, lora: Any) -> None:
    """Give every module of the adapter the model's name, and stage its routed experts.

    Args:
        manager: vLLM's `LoRAModelManager`, its modules wrapped.
        lora: a `LoRAModel` before upstream packs it. Staged experts go into ``lora.loras`` under
            the wrapper's name, in the form that `set_lora` takes.

    Raises:
        AdapterError: a tensor has no place, or does not fit it. Nothing has changed then but
            ``lora`` itself. A second call does nothing.
    """
    if getattr(lora, "moe_lora_fits", False):
        return
    lora.moe_lora_fits = True
    pending: Pending | None = getattr(lora, "moe_lora", None)
    if pending is None and strict.is_warm_up(lora):
        return _local_warm_up(manager, lora)
    try:
        with about(lora.id):
            _fit(manager, lora, pending)
    finally:
        if pending is not None:
            pending.quiet.release()
    return None


def _local_warm_up(manager: Any, lora: Any) -> None:
    """Zeros of this rank's experts where vLLM made some that it takes for all experts'.

    Up to 0.32 its warm-up adapter has the experts of one rank where gate and up are fused, and it
    takes that apart by the number of all experts.
    """
    staged = {}
    for name, wrapper in manager.modules.items():
        if is_experts(wrapper) and lora.loras.pop(f"{name}.base_layer", None) is not None:
            nothing = stage(Experts(name, "warm-up"), slots_of(manager, wrapper))
            staged[name] = as_taken(manager, wrapper, nothing)
    _deliver(lora, staged)


def _fit(manager: Any, lora: Any, pending: Pending | None) -> None:
    if pending is not None and pending.refused is not None and not serves_moe(manager):
        raise pending.refused
    places = strict.places(manager)
    spellings = Spellings(places)
    for name in [name for name in lora.loras if name not in places]:
        own = spellings.find(name)
        if own is not None and own in lora.loras:
            raise AdapterError(f"{name} and {own} are one module")
        if own is not None:
            lora.loras[own] = lora.loras.pop(name)
            lora.loras[own].module_name = own
    strict.check(manager, lora, places)
    merged_projections.merge(manager, lora)
    if pending is None:
        return
    wrappers = {name: m for name, m in manager.modules.items() if is_experts(m)}
    fitted = _wrappers_of(manager, lora, pending, wrappers)
    for name in fitted.values():
        supports_lora.demand(name, wrappers[name])
    if fitted:
        dims = dims_of(manager, next(iter(wrappers.values())))
        layers = {prefix: pending.layers[prefix] for prefix in fitted}
        resolved, notes = resolve(layers, dims, pending.config)
        staged = {}
        for found in resolved:
            wrapper = wrappers[fitted[found.prefix]]
            tensors = stage(found, slots_of(manager, wrapper))
            staged[fitted[found.prefix]] = as_taken(manager, wrapper, tensors)
        for note in notes:
            logger.warning("LoRA adapter %d: %s", lora.id, note)
        logger.debug("LoRA adapter %d: %s", lora.id, {found.layout for found in resolved})
        _deliver(lora, staged)
    if not lora.loras:
        raise AdapterError("it has no tensor for this model")
    del lora.moe_lora  # and with it the views of the file


def _wrappers_of(
    manager: Any, lora: Any, pending: Pending, wrappers: dict[str, Any]
) -> dict[str, str]:
    """Prefix in the adapter -> name of the model's layer."""
    spellings = Spellings(wrappers)
    fitted: dict[str, str] = {}
    lost = []
    for prefix, mapped in pending.mapped.items():
        own = spellings.find(mapped)
        if own is None:
            lost.append(prefix)
        elif own in fitted.values():
            raise AdapterError(f"{prefix} is there under two names")
        else:
            fitted[prefix] = own
    if not lost or strict.may_be_elsewhere(manager):
        return fitted
    if not wrappers:
        raise AdapterError(
            f"it has routed experts ({listed(lost)}), this model has none "
            "that take LoRA. Nothing was loaded."
        )
    raise AdapterError(
        f"this model has no place for {listed(lost)}. Nothing was loaded. "
        f"Its routed experts are {listed(wrappers)}."
    )


def _deliver(lora: Any, staged: dict[str, Any]) -> None:
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    for name, (a, b) in staged.items():
        rank = max(one.shape[-2] for one in a)
        ones = [1.0] * len(a)
        lora.loras[name] = PackedLoRALayerWeights(name, rank, list(ones), a, b, scaling=ones)
