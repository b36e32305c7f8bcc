"""Our Triton kernels in the place of Punica's for LoRA on routed experts, on a GPU (0.28 to 0.33).

All of upstream's experts with LoRA end in two calls, `add_lora_w13` before the activation and
`add_lora_w2` after the second product, and hand what the first returns to the second unopened.
Here the first makes one routing for both. The factors are vLLM's own stacks; what is kept beside
them are their ranks, found on the device whenever a slot changes.

Which kernels run is decided once for each layer, when its first slot is written: before any
request has an adapter and before a CUDA graph is captured.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ... import envs
from ...log import get_logger, warning_once
from . import base_product

if TYPE_CHECKING:
    from ...kernels.triton.route import Routing

logger = get_logger(__name__)
_INSTEAD = "Upstream's kernels run instead; VLLM_MOE_LORA_KERNELS=upstream says so without this."
_KEPT = "_moe_lora_segments"  # attribute of a LoRA layer


class Segments:
    """One layer's factors as our kernels take them.

    Attributes:
        w13: gate and up, or one slice that is fused or not gated.
        swapped: w13 with its slices in the other order, as TRT-LLM's experts want them.
        w2: down.
        active: [slots, experts] bool, where an adapter in use has any factor.
        tail: LoRA is the tail of the base's product where that is Triton's.
    """

    def __init__(self, layer: Any, tail: bool = False) -> None:
        """
        Args:
            layer: vLLM's FusedMoEWithLoRA, or what it is wrapped by.

        Raises:
            TypeError, ValueError: the kernels do not take its stacks; the text says why.
        """
        from ...kernels.triton.factors import Factors

        self.tail, experts = tail, layer.local_num_experts
        a, b = tuple(layer.w13_lora_a_stacked), tuple(layer.w13_lora_b_stacked)
        self.w13 = Factors(a, b, experts)
        self.swapped = Factors(a[::-1], b[::-1], experts) if len(a) == 2 else self.w13
        self.w2 = Factors(layer.w2_lora_a_stacked, layer.w2_lora_b_stacked, experts)
        self.enabled = layer.adapter_enabled
        size = (self.w13.num_slots, experts)
        self.active = torch.zeros(size, dtype=torch.bool, device=self.w13.device)
        for slot in range(self.w13.num_slots):
            self.written(slot)

    def of(self, layer: Any) -> bool:
        """Whether the layer still has the stacks that this was made for."""
        return self.w13.lora_a[0] is layer.w13_lora_a_stacked[0]

    def written(self, slot: int) -> None:
        """``slot`` has other factors than before. In place: a captured graph sees it."""
        self.w13.find_ranks(slot)
        self.w2.find_ranks(slot)
        if self.swapped is not self.w13:
            self.swapped.ranks[:, slot] = self.w13.ranks[:, slot].flip(0)
        ranks = torch.cat([self.w13.ranks[:, slot], self.w2.ranks[:, slot]])
        self.active[slot] = ranks.gt(0).any(0) & self.enabled[slot].ne(0)

    def cleared(self, slot: int) -> None:
        """``slot`` is all zero."""
        for factors in (self.w13, self.swapped, self.w2):
            factors.ranks[:, slot] = 0
        self.active[slot] = False


@dataclass(frozen=True)
class Handed:
    """What `add_w13` leaves for `add_w2`, where upstream's sorted token ids would be.

    Attributes:
        routing: None where no token of the batch has an adapter.
        token_slots: [tokens] int32.
    """

    segments: Segments
    routing: Routing | None
    token_slots: torch.Tensor


# Address of the first A and of the first B -> whose they are. The layer keeps it alive.
_segments: weakref.WeakValueDictionary[tuple[int, int], Segments] = weakref.WeakValueDictionary()


def slot_written(layer: Any, slot: int) -> None:
    """After every `set_lora` of ``layer``, vLLM's FusedMoEWithLoRA."""
    # Inside a step, a tensor made here could not be written to outside of steps later.
    with torch.inference_mode(False), torch.no_grad():
        if _kept(layer):
            layer.__dict__[_KEPT].written(slot)
        elif _KEPT not in layer.__dict__:
            _keep(layer)


def slot_cleared(layer: Any, slot: int) -> None:
    """After every `reset_lora`."""
    with torch.inference_mode(False), torch.no_grad():
        if _kept(layer):
            layer.__dict__[_KEPT].cleared(slot)


def _kept(layer: Any) -> bool:
    """Whether our kernels serve the layer, and its stacks are still those they know."""
    kept = layer.__dict__.get(_KEPT)
    if kept is not None and not kept.of(layer):
        del layer.__dict__[_KEPT]
        kept = None
    return kept is not None


def _keep(layer: Any) -> None:
    made = _made(layer)
    layer.__dict__[_KEPT] = made
    if made is not None:
        for factors in (made.w13, made.swapped, made.w2):
            _segments[_address(factors.lora_a, factors.lora_b)] = made


def _made(layer: Any) -> Segments | None:
    choice = envs.get("VLLM_MOE_LORA_KERNELS")
    if choice == "upstream":
        return None
    from ...kernels.triton import checks, config

    try:
        part = checks.arch_of(layer.w13_lora_a_stacked[0].device)
        if choice == "auto" and not config.measured(part):
            logger.debug("MoE LoRA: upstream's kernels, as ours were not measured on %s", part)
            return None
        if layer.fully_sharded:
            raise ValueError("factors are sharded in their rank (--fully-sharded-loras)")
        made = Segments(layer, choice == "tail")
    except (TypeError, ValueError, ImportError) as error:
        warning_once(f"MoE LoRA kernels cannot serve this model: {error}. {_INSTEAD}")
        return None
    logger.debug("MoE LoRA: our kernels, on %s", part)
    return made


def _address(lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor]) -> tuple[int, int]:
    return lora_a[0].data_ptr(), lora_b[0].data_ptr()


def applying(experts: Any) -> Any:
    """For one call of `TritonExperts.apply`: whether its products wait for LoRA."""
    context, wanted = experts._lora_context, False
    if context is not None and context.aux_stream is None:
        stacks = context.w13_lora_a_stacked, context.w13_lora_b_stacked
        segments = _segments.get(_address(*stacks))
        wanted = segments is not None and segments.tail
    return base_product.applying(wanted)


def add_w13(
    punica: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_tokens: int,
    add_inputs: bool,
    token_slots: torch.Tensor | None,
) -> tuple[Any, None, None, torch.Tensor] | None:
    """`PunicaWrapperGPU.add_lora_w13`, or None where upstream is to do it.

    Args:
        y: [tokens, top_k, out] or [tokens * top_k, out], changed in place.
        x: [tokens, hidden].
        lora_a, lora_b: the layer's stacks, or views of them expanded over the experts.
        topk_ids, topk_weights: [tokens, top_k].
        expert_map: as upstream has it, [experts of the model] int32.
        token_slots: [tokens] int32 after dispatch to this rank, None for the batch's own.
    """
    segments = _segments.get(_address(lora_a, lora_b))
    if segments is None:
        return None
    # Known on the CPU for the batch's own tokens alone; of others' it says nothing.
    base_only = False
    if token_slots is None:
        token_slots, *_, no_lora, _ = punica.token_mapping_meta.meta_args(
            num_tokens, punica.lora_config.specialize_active_lora
        )
        base_only = bool(no_lora.item())
    from ...kernels.triton import checks, launch, route
    from ...kernels.triton.grouped import Lora

    product = base_product.waiting(y, x)
    factors = segments.w13
    if factors.lora_a[0].data_ptr() != lora_a[0].data_ptr():
        factors = segments.swapped
    try:
        if base_only:
            if product is not None:  # the kernel that runs beside adapters, too
                product.run(topk_ids.shape[1], None, factors.slices)
                base_product.done()
            return Handed(segments, None, token_slots), None, None, token_slots
        # What only w2 would find out, when there is no way back any more.
        floats = (torch.float32, torch.bfloat16, torch.float16)
        shape = tuple(topk_ids.shape)
        checks.check_ids("topk_weights", topk_weights, factors.device, floats, shape)
        routing = route.route(
            topk_ids,
            token_slots,
            factors.num_slots,
            factors.num_experts,
            factors.dtype,
            expert_map,
            segments.active,
        )
        if product is None:
            launch.add_lora(y, x, factors, routing, add_inputs=add_inputs)
        else:
            lora = Lora(factors, routing, token_slots)
            product.run(routing.top_k, lora, factors.slices)
            base_product.done()
    except (TypeError, ValueError) as error:  # y is as it was
        warning_once(f"{error}. {_INSTEAD}")
        return None
    return Handed(segments, routing, token_slots), None, None, token_slots


def add_w2(
    handed: Handed, y: torch.Tensor, x: torch.Tensor, topk_weights: torch.Tensor, add_inputs: bool
) -> None:
    """`PunicaWrapperGPU.add_lora_w2` after our `add_w13`; upstream's always weights.

    Args:
        y: [tokens, top_k, hidden], changed in place.
        x: [tokens * top_k, intermediate].

    Raises:
        TypeError, ValueError: the kernels do not take them, and the routing is ours already.
    """
    routing, factors = handed.routing, handed.segments.w2
    product = base_product.waiting(y, x)
    if product is not None and product.topk_weights is not None:
        from ...kernels.triton.grouped import Lora

        slots = handed.token_slots
        lora = None if routing is None else Lora(factors, routing, slots)
        try:
            product.run(topk_weights.shape[1], lora, factors.slices)
            return base_product.done()
        except (TypeError, ValueError) as error:  # y is as it was
            warning_once(f"{error}. {_INSTEAD}")
    base_product.flush()
    if routing is None:
        return None
    from ...kernels.triton.launch import add_lora

    try:
        add_lora(y, x, factors, routing, topk_weights, add_inputs)
    except (TypeError, ValueError) as error:
        text = f"{error}. Cure: VLLM_MOE_LORA_KERNELS=upstream."
        raise type(error)(text) from error
    return None
