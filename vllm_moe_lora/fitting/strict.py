"""Checks that every tensor of an adapter has a module in the model and the right shape.

vLLM itself ignores, cuts or pads what does not fit. Here it is an error, and the adapter is not
loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..adapters.errors import AdapterError, listed, rank_text
from ..adapters.spelling import Spellings
from ..models.declare import why_ignored
from ..targets import target_modules
from . import merged_projections
from .moe_layers import is_experts, unwrapped

# Module name that an adapter may use -> (out, in) of the module; None if this process cannot tell.
Shapes = dict[str, tuple[int, int] | None]


def check(manager: Any, lora: Any, shapes: Shapes) -> None:
    """Refuse an adapter of which a part would be ignored, cut or padded.

    Args:
        manager: vLLM's `LoRAModelManager` of a MoE model. Its modules are wrapped in LoRA layers.
        lora: the loaded `LoRAModel`. Its routed experts, if any, are pending in ``lora.moe_lora``.
        shapes: `module_shapes` of the manager.

    Raises:
        AdapterError: names the module or tensor. Nothing has changed then.
    """
    _refuse_unreachable(manager, lora)
    unknown = [name for name in lora.loras if name not in shapes]
    _refuse_left_out(manager, lora, unknown)
    _refuse_towers(manager, unknown)
    if unknown and not is_pipeline_parallel():
        raise AdapterError(
            f"no module of this model that takes LoRA is called {listed(unknown)}. Nothing was "
            "loaded. Check that the adapter was trained on this model and that its module names "
            "are the checkpoint's."
        )
    limit = manager.lora_config.max_lora_rank
    for name, weights in lora.loras.items():
        for a, b in _pairs(weights):
            _check_pair(name, a, b, limit, shapes.get(name))


def _refuse_left_out(manager: Any, lora: Any, unknown: list[str]) -> None:
    """Refuse LoRA on modules that run without LoRA by decision, not because they do not exist.

    Either --lora-target-modules leaves them out, or they are routed experts that were built without
    LoRA (`targets/target_modules.py`).

    Args:
        unknown: names in ``lora.loras`` that are not modules with LoRA.
    """
    config, packed = manager.lora_config, getattr(manager, "packed_modules_mapping", {})
    dense = {name for name in unknown if target_modules.leaves_out(config, name, packed)}
    words = {name.rpartition(".")[2] for name in dense}
    # vLLM 0.19 does not wrap a packed module if the flag names only a part of it.
    if target_modules.flagged(config):
        here = {name for name, _ in manager.model.named_modules()}
        for name in set(unknown) - dense:
            parent, _, own = name.rpartition(".")
            whole = {w for w, parts in packed.items() if own in parts and f"{parent}.{w}" in here}
            if whole:
                dense.add(name)
                words |= whole | {own}
    left_out = [listed(dense)] if dense else []
    pending, layers = getattr(lora, "moe_lora", None), Spellings(unwrapped(manager))
    targeted = {p: layers.find(own) for p, own in (pending.mapped if pending else {}).items()}
    targeted = {prefix: layer for prefix, layer in targeted.items() if layer is not None}
    if pending is not None and targeted:
        prefix, layer = min(targeted.items())
        parts = pending.layers[prefix].values()
        first = min(name for sides in parts for name, _ in sides.values())
        more = f" and {len(targeted) - 1} more" if len(targeted) > 1 else ""
        left_out.insert(0, f"{first} (routed experts of {layer}{more})")
        words |= {str(one).rpartition(".")[2] for one in targeted.values()}
    if left_out:
        what = f"it has LoRA on {', '.join(left_out)}"
        raise AdapterError(target_modules.left_out_message(config, what, words))


def _refuse_towers(manager: Any, unknown: list[str]) -> None:
    """Refuse LoRA on the towers of a multimodal model for which vLLM has no LoRA there.

    Args:
        unknown: as in `_refuse_left_out`.
    """
    mapping = getattr(manager, "mm_mapping", None)
    towers = [*mapping.tower_model, *mapping.connector] if mapping is not None else []
    found = [name for name in unknown if name.startswith(tuple(f"{tower}." for tower in towers))]
    if found:
        raise AdapterError(
            f"it has LoRA on {listed(found)}, but vLLM has no LoRA on {' and '.join(towers)} of "
            f"{type(manager.model).__name__} with these settings. Nothing was loaded. Train "
            "without these modules, or merge them into the model."
        )


def is_warm_up(lora: Any) -> bool:
    """Whether this is one of vLLM's own warm-up adapters. They consist of zeros only."""
    return not any(
        a.any() or b.any() for weights in lora.loras.values() for a, b in _pairs(weights)
    )


def _refuse_unreachable(manager: Any, lora: Any) -> None:
    """Refuse LoRA on modules whose weight vLLM reads directly, as attention does in MLA."""
    for name in lora.loras:
        if why := why_ignored(getattr(manager, "model", None), name):
            raise AdapterError(f"{name} cannot take LoRA in vLLM: {why}.")
    for name, holder in getattr(manager, "moe_lora_unreachable", {}).items():
        weights = lora.loras.get(name)
        if weights is not None:
            raise AdapterError(
                f"{name} cannot take LoRA in vLLM: {holder} reads its "
                "weight directly, so the adapter would be ignored there. Merge the adapter into "
                "the model, or train without this module."
            )


def _check_pair(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    limit: int,
    shape: tuple[int, int] | None,
) -> None:
    """Check lora_a and lora_b of one module.

    Args:
        limit: the engine's max_lora_rank.
        shape: (out, in) of the module, None if not known.
    """
    if a.ndim != 2 or b.ndim != 2:
        raise AdapterError(
            f"{name} has {a.ndim}-D lora_A and {b.ndim}-D lora_B, but both must have two "
            "dimensions. The adapter is for another model, or the file is damaged."
        )
    rank = a.shape[0]
    if rank != b.shape[1]:
        raise AdapterError(
            f"{name} has lora_A of rank {rank} but lora_B of rank "
            f"{b.shape[1]}. The file is damaged or was cut."
        )
    if rank > limit:
        raise AdapterError(rank_text(f"{name}.lora_A", rank, limit))
    if shape is not None and (b.shape[0], a.shape[1]) != shape:
        raise AdapterError(
            f"{name} is {b.shape[0]} x {a.shape[1]} (out x in), but the model's module is "
            f"{shape[0]} x {shape[1]}. The adapter is for another model."
        )
    for side, values in (("lora_A", a), ("lora_B", b)):
        if not all(torch.isfinite(bound) for bound in torch.aminmax(values)):
            raise AdapterError(
                f"{name}.{side} has NaN or infinite numbers. The training run diverged or the file "
                "is damaged."
            )


def _pairs(weights: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """lora_a and lora_b of a module, or of each part of a packed module."""
    a, b = weights.lora_a, weights.lora_b
    if isinstance(a, list):
        yield from (pair for pair in zip(a, b, strict=True) if pair[0] is not None)
    else:
        yield a, b


def module_shapes(manager: Any) -> Shapes:
    """Every module of the model that takes LoRA, under the names that adapters may use.

    These are the module's name, and the names of its parts if it is a packed module.
    """
    found: Shapes = {}
    for name, module in manager.modules.items():
        parts = manager.packed_modules.get(name)
        if is_experts(module):
            found[name] = None  # `adapters/layouts` checks the shapes of routed experts
            continue
        if parts is None:
            found[name] = _shape(module, 0)
            continue
        own = len(getattr(module, "lora_a_stacked", ()))
        for index, part in enumerate(parts):
            found[part] = _shape(module, index) if own == len(parts) else None
        found.update(dict.fromkeys(merged_projections.parts_of(name, module)))
        found[name] = None
    return found


def _shape(module: Any, index: int) -> tuple[int, int] | None:
    """(out, in) of one slice of a LoRA layer; None if it cannot be read from the layer.

    That is so if the layer is split over devices, and for vocabularies, which vLLM pads.
    """
    a, b = getattr(module, "lora_a_stacked", None), getattr(module, "lora_b_stacked", None)
    base = getattr(module, "base_layer", None)
    if getattr(module, "tp_size", 1) != 1 or not hasattr(base, "input_size"):
        return None
    if not isinstance(a, tuple) or not isinstance(b, tuple):
        return None
    return b[index].shape[-2], a[index].shape[-1]


def is_pipeline_parallel() -> bool:
    """Whether other devices have other layers. A missing module is then no error."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().world_size > 1)
