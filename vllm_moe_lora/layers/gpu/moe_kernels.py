"""Runs our Triton kernels in place of Punica's, for LoRA on routed experts on a GPU (0.28 to 0.33).

All of upstream's experts with LoRA make two calls: `add_lora_w13` before the activation, and
`add_lora_w2` after the second GEMM. They pass what the first returns on to the second, without
looking at it. hooks/lora_punica_gpu.py calls `add_w13` and `add_w2` here instead. `add_w13`
computes the routing of the batch once, for both.

The factors are in vLLM's slot buffers, or in pages (pages.py). `LayerFactors` adds the rank that
each slot and expert uses. It is computed on the device when a slot changes
(hooks/lora_layers_fused_moe_slots.py).

Which kernels a layer uses is decided once, at the latest when its first slot is written
(choose.py). That is before any request has an adapter, and before a CUDA graph is captured. A
record of `vllm-moe-lora tune` may choose others for other batch sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ... import envs
from ...log import get_logger, warning_once
from . import base_product, choose

if TYPE_CHECKING:
    from ...kernels.triton.route import Routing
    from ...records import Record

logger = get_logger(__name__)
_FALLBACK = (
    "Upstream's kernels run instead. VLLM_MOE_LORA_KERNELS=upstream selects them without this "
    "warning."
)
_CURE = "Cure: VLLM_MOE_LORA_KERNELS=upstream."
_FACTORS = "_moe_lora_factors"  # attribute of a LoRA layer: its `LayerFactors`, None for upstream


class LayerFactors:
    """The LoRA factors of one layer, as our kernels take them.

    Attributes:
        w13: gate and up as two slices; or one slice, if they are fused or there is no gate.
        swapped: w13 with up before gate, as TRT-LLM's experts ask for it.
        w2: down.
        enabled: vLLM's `adapter_enabled`, [slots + 1] int32, 0 for an empty slot.
        active: [slots, experts] bool, whether the adapter in the slot has LoRA on that expert.
        record: chooses the kernels by batch size; None for the same kernels always.
    """

    def __init__(self, layer: Any, kind: str = "ours", record: Record | None = None) -> None:
        """Take over vLLM's slot buffers, with what they hold now.

        Args:
            layer: vLLM's `FusedMoEWithLoRA`.
            kind: the kernels without a record: "ours", or "tail" if base GEMM and LoRA shall run in
                one kernel (base_product.py; Triton experts only).
            record: see the attribute.

        Raises:
            TypeError, ValueError: the kernels do not support the buffers; the text says why.
        """
        from ...kernels.triton.factors import Factors

        self._kind, self.record, experts = kind, record, layer.local_num_experts
        a, b = tuple(layer.w13_lora_a_stacked), tuple(layer.w13_lora_b_stacked)
        self.w13 = Factors(a, b, experts)
        self.swapped = Factors(a[::-1], b[::-1], experts) if len(a) == 2 else self.w13
        self.w2 = Factors(layer.w2_lora_a_stacked, layer.w2_lora_b_stacked, experts)
        self.enabled = layer.adapter_enabled
        size = (self.w13.num_slots, experts)
        self.active = torch.zeros(size, dtype=torch.bool, device=self.w13.device)
        for slot in range(self.w13.num_slots):
            self.slot_written(slot)

    def kernels(self, tokens: int) -> str:
        """Return which kernels serve a batch of ``tokens`` tokens: a kind of records.py."""
        return self._kind if self.record is None else self.record.winner(tokens)

    @property
    def tail(self) -> bool:
        """Whether some batch may run base GEMM and LoRA in one kernel."""
        return self._kind == "tail" if self.record is None else "tail" in self.record.kinds

    def belongs_to(self, layer: Any) -> bool:
        """Return whether these are still the buffers of ``layer``; vLLM may create new ones."""
        return self.w13.lora_a[0] is layer.w13_lora_a_stacked[0]

    def slot_written(self, slot: int) -> None:
        """Find the ranks of ``slot`` again, after its factors have changed.

        The tensors are changed in place, because a captured CUDA graph reads them.
        """
        self.w13.find_ranks(slot)
        self.w2.find_ranks(slot)
        if self.swapped is not self.w13:
            self.swapped.ranks[:, slot] = self.w13.ranks[:, slot].flip(0)
        ranks = torch.cat([self.w13.ranks[:, slot], self.w2.ranks[:, slot]])
        self.active[slot] = ranks.gt(0).any(0) & self.enabled[slot].ne(0)

    def slot_cleared(self, slot: int) -> None:
        """Set the ranks of ``slot`` to 0, in place, after its factors were set to zero."""
        for factors in (self.w13, self.swapped, self.w2):
            factors.ranks[:, slot] = 0
        self.active[slot] = False


@dataclass(frozen=True)
class RoutedBatch:
    """What `add_w13` passes to `add_w2`, in the place of upstream's sorted token ids.

    Attributes:
        layer: the factors of the layer.
        routing: of the token-expert pairs with LoRA; None if no token has an adapter.
        token_slots: [tokens] int32, the adapter slot of each token; -1 for none.
        kind: the kernels of this batch, "ours" or "tail".
    """

    layer: LayerFactors
    routing: Routing | None
    token_slots: torch.Tensor
    kind: str


# (address of the first lora_a, address of the first lora_b) of w13 or w2 -> the layer's factors.
# The layer keeps them alive.
_by_address: weakref.WeakValueDictionary[tuple[int, int], LayerFactors] = (
    weakref.WeakValueDictionary()
)


def slot_written(layer: Any, slot: int) -> None:
    """Update the ranks of ``slot``; called after each `set_lora`.

    Args:
        layer: vLLM's `FusedMoEWithLoRA`.
        slot: from 0.
    """
    # vLLM may call this in inference mode. A tensor that is created there cannot be changed outside
    # of it later.
    with torch.inference_mode(False), torch.no_grad():
        if _factors_of(layer) is not None:
            layer.__dict__[_FACTORS].slot_written(slot)
        elif _FACTORS not in layer.__dict__:
            register(layer)


def slot_cleared(layer: Any, slot: int) -> None:
    """Set the ranks of ``slot`` to 0; called after each `reset_lora`."""
    with torch.inference_mode(False), torch.no_grad():
        if (factors := _factors_of(layer)) is not None:
            factors.slot_cleared(slot)


def _factors_of(layer: Any) -> LayerFactors | None:
    """Return the factors of a layer that uses our kernels; forget those of older buffers."""
    factors: LayerFactors | None = layer.__dict__.get(_FACTORS)
    if factors is not None and not factors.belongs_to(layer):
        del layer.__dict__[_FACTORS]
        return None
    return factors


def register(layer: Any) -> bool:
    """Decide which kernels serve ``layer``, and remember it. Return whether ours serve it.

    Args:
        layer: vLLM's `FusedMoEWithLoRA`, with its slot buffers.
    """
    made = _make_factors(layer)
    layer.__dict__[_FACTORS] = made
    if made is None:
        return False
    for factors in (made.w13, made.swapped, made.w2):
        _by_address[_address(factors.lora_a, factors.lora_b)] = made
    return True


def serves_all_batches(layer: Any) -> bool:
    """Return whether our kernels are chosen for batches of all sizes.

    Args:
        layer: vLLM's `FusedMoEWithLoRA`. Its slot buffers need no memory yet.
    """
    try:
        found = _chosen(layer)
    except ImportError:  # without Triton; `register` says so
        return False
    if found is None:
        return False
    _, record = found
    same = layer.w2_lora_a_stacked[0].dtype == layer.moe_config.in_dtype
    always = record is None or "upstream" not in record.kinds
    return same and always and not layer.fully_sharded


def _chosen(layer: Any) -> tuple[str, Record | None] | None:
    """Return the device's architecture, and a record if one chooses; None for upstream's only."""
    choice = envs.get("VLLM_MOE_LORA_KERNELS")
    if choice == "upstream":
        return None
    from ...kernels.triton import checks

    arch = checks.arch_of(layer.adapter_enabled.device)
    record = choose.record_for(layer, arch) if choice == "auto" else None
    if choice == "auto" and (record is None or record.kinds == {"upstream"}):
        return None
    return arch, record


def _make_factors(layer: Any) -> LayerFactors | None:
    """Return the factors for our kernels, or None if upstream's kernels serve ``layer``."""
    try:
        found = _chosen(layer)
        if found is None:
            return None
        arch, record = found
        if layer.fully_sharded:
            raise ValueError("the factors are split along their rank (--fully-sharded-loras)")
        made = LayerFactors(layer, str(envs.get("VLLM_MOE_LORA_KERNELS")), record)
        if record is not None:
            from ...kernels.triton import config

            tiles = tuple(config.Tiles(*sizes) for sizes in record.tiles)
            config.use(arch, made.w13.dtype, made.w13.max_rank, tiles)
    except (TypeError, ValueError, ImportError) as error:
        warning_once(f"MoE LoRA kernels cannot serve this model: {error}. {_FALLBACK}")
        return None
    logger.debug("MoE LoRA: our kernels, on %s", arch)
    return made


def _address(lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor]) -> tuple[int, int]:
    return lora_a[0].data_ptr(), lora_b[0].data_ptr()


def deferring(experts: Any) -> Any:
    """Return the context manager for one call of `TritonExperts.apply`, see `base_product`.

    It defers the GEMMs if the layer uses our kernels with VLLM_MOE_LORA_KERNELS=tail, and if LoRA
    does not run on a second CUDA stream.
    """
    context, enabled = experts._lora_context, False
    if context is not None and context.aux_stream is None:
        stacks = context.w13_lora_a_stacked, context.w13_lora_b_stacked
        factors = _by_address.get(_address(*stacks))
        enabled = factors is not None and factors.tail
    return base_product.deferring(enabled)


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
    """Add the LoRA of w13, as `PunicaWrapperGPU.add_lora_w13` does.

    Args:
        punica: the `PunicaWrapperGPU`.
        y: [tokens, top_k, out] or [tokens * top_k, out], changed in place.
        x: [tokens, hidden].
        lora_a, lora_b: the layer's slot buffers, or views of them expanded over the experts.
        topk_ids, topk_weights: [tokens, top_k].
        expert_map: [experts of the model] int32, the local expert, or -1 for one on another device.
            None if all experts are local.
        num_tokens: tokens of the batch.
        add_inputs: False to overwrite ``y`` with the LoRA.
        token_slots: [tokens] int32, the adapter slots of tokens that were sent to this device by
            others. None for the batch's own tokens.

    Returns:
        What upstream's function returns, with a `RoutedBatch` as its first item. None if upstream's
        function has to be called, because the layer uses upstream's kernels, or our kernels do not
        support the tensors (then with a warning). ``y`` is then unchanged.

    Raises:
        TypeError, ValueError: our kernels do not support the tensors, and upstream's cannot run
            instead, because the factors are in pages.
    """
    layer = _by_address.get(_address(lora_a, lora_b))
    kind = "upstream" if layer is None else layer.kernels(topk_ids.shape[0])
    if layer is None or kind == "upstream":
        return None
    # The flag no_lora is on the CPU. It is about the batch's own tokens only.
    base_only = False
    if token_slots is None:
        token_slots, *_, no_lora, _ = punica.token_mapping_meta.meta_args(
            num_tokens, punica.lora_config.specialize_active_lora
        )
        base_only = bool(no_lora.item())
    from ...kernels.triton import checks, launch, route
    from ...kernels.triton.grouped import Lora

    if kind != "tail":
        base_product.flush()
    product = base_product.deferred_for(y, x)
    factors = layer.w13
    if factors.lora_a[0].data_ptr() != lora_a[0].data_ptr():
        factors = layer.swapped
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    try:
        if base_only:
            if product is not None:
                # Our kernel, not upstream's, so that a token has the same result in a batch with
                # adapters and in one without.
                product.run(topk_ids.shape[1], None, factors.slices)
                base_product.mark_done()
            return RoutedBatch(layer, None, token_slots, kind), None, None, token_slots
        # add_w2 needs topk_weights. There it is too late to call upstream's function.
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
            layer.active,
        )
        if product is None:
            launch.add_lora(y, x, factors, routing, add_inputs=add_inputs)
        else:
            lora = Lora(factors, routing, token_slots)
            product.run(routing.top_k, lora, factors.slices)
            base_product.mark_done()
    except (TypeError, ValueError) as error:  # raised by checks, before y is changed
        if factors.page:  # upstream's kernels cannot read pages
            raise type(error)(f"{error}. {_CURE}") from error
        warning_once(f"{error}. {_FALLBACK}")
        return None
    return RoutedBatch(layer, routing, token_slots, kind), None, None, token_slots


def add_w2(
    batch: RoutedBatch,
    y: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    add_inputs: bool,
) -> None:
    """Add the LoRA of w2, as `PunicaWrapperGPU.add_lora_w2` does.

    Like upstream's function, it always multiplies with the router weights.

    Args:
        batch: from `add_w13`.
        y: [tokens, top_k, hidden], changed in place.
        x: [tokens * top_k, intermediate].
        topk_weights: [tokens, top_k].
        add_inputs: False to overwrite ``y`` with the LoRA.

    Raises:
        TypeError, ValueError: our kernels do not support the tensors. Upstream's kernels cannot run
            instead, because they need their own routing.
    """
    routing, factors, topk_weights = batch.routing, batch.layer.w2, topk_weights.contiguous()
    product = base_product.deferred_for(y, x) if batch.kind == "tail" else None
    if product is not None and product.topk_weights is not None:
        from ...kernels.triton.grouped import Lora

        slots = batch.token_slots
        lora = None if routing is None else Lora(factors, routing, slots)
        try:
            product.run(topk_weights.shape[1], lora, factors.slices)
            return base_product.mark_done()
        except (TypeError, ValueError) as error:  # raised by checks, before y is changed
            warning_once(f"{error}. {_FALLBACK}")
    base_product.flush()
    if routing is None:
        return None
    from ...kernels.triton.launch import add_lora

    try:
        add_lora(y, x, factors, routing, topk_weights, add_inputs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}. {_CURE}") from error
    return None
