"""LoRA on unquantised experts on the CPU, in vLLM 0.30 to 0.33: factors inside the base weights.

vLLM's CPU operator `cpu_fused_moe` computes w2·act(w13·x) and the weighted sum over experts in one
call. There is no place between the two products to add LoRA. But with A = lora_a and B = lora_b

    [W13 | B13] · [x ; A13·x]  =  W13·x + B13·(A13·x)      and      [W2 ; A2] · h  =  [W2·h ; A2·h]

So B13 is appended to w13 as input columns, and A2 is appended to w2 as output rows. A13·x is
computed before the call, and B2·(A2·h) is added after it. The operator adds the LoRA of w13 in its
fp32 accumulator, before the activation.

vLLM packs the weights for the operator. The packed layout keeps 16 output rows together, with all
their input columns (`layout_is_plain` checks this once per process). So the factors of an adapter
can be written into the packed weights in place, and no second copy of the experts is needed.
Columns exist only for adapters that are in a slot, as many as their rank. As long as there was no
adapter, the weights are upstream's, unchanged.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...kernels.cpu import PairPlan, expand_add, shrink
from ...kernels.native.pairs import Pairs
from .columns import ColumnAllocator
from .experts import CPULoRAExperts, combine
from .packing import (
    PACK_COLUMNS,
    PACK_ROWS,
    blocks,
    layout_is_plain,
    pack,
    round_up,
    unpack,
    widen_columns,
    widen_rows,
)

KEPT = 64  # pairs
PACKED = "moe_lora_packed"  # attribute of a Parameter: whether its data are packed


@functools.cache
def _operators() -> Any:
    from vllm import _custom_ops

    return _custom_ops


@functools.cache
def _ones(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return ones, [count, 1]. Nobody may write to them."""
    with torch.inference_mode(False):
        return torch.ones(count, 1, dtype=dtype)


class WidenedCPUExperts(CPULoRAExperts):
    """Mixin that adds LoRA to upstream's `CPUUnquantizedExperts` or a subclass (AMX, Arm, Power).

    ``isa``, ``w1_bias`` and ``w2_bias`` are upstream's attributes.

    The base weights may be loaded again while adapters are in slots. vLLM's `reload_weights` loads
    them into new tensors and copies these into the old ones, which must then have upstream's
    shapes: `suspend` sees to that. A `load_weights` on the live model writes into the weights
    themselves, so these are unpacked before (`before_load`), and packed again after. Either way the
    factors of the slots are written again before the next product (`_resume`).
    """

    isa: str
    w1_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    _layer: Any = None  # upstream's layer, which has the weights
    _wrapper: Any = None  # the LoRA layer around it
    _suspended: dict[int, int]  # slot -> rank, where factors have to be written again

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Let upstream pack the weights, and check that they can be widened.

        Raises:
            NotImplementedError: they cannot.
        """
        if all(getattr(one, PACKED, False) for one in (layer.w13_weight, layer.w2_weight)):
            return  # nothing was loaded since
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        if getattr(self, "_use_zentorch", False):
            raise NotImplementedError(
                "MoE LoRA cannot use zentorch's fused MoE operator (its weights cannot be "
                "widened). Uninstall zentorch, or serve without --enable-lora."
            )
        if not layout_is_plain(self.isa, layer.w13_weight.dtype):
            raise NotImplementedError(
                f"vLLM's packed CPU MoE weight layout ({self.isa}, {layer.w13_weight.dtype}) is "
                "not the one vllm-moe-lora knows. Report this with your vLLM version."
            )
        setattr(layer.w13_weight, PACKED, True)
        setattr(layer.w2_weight, PACKED, True)
        if self._layer is None:
            self._layer, self._suspended = layer, {}
        self._hidden = layer.w13_weight.shape[2]
        self._w13_columns = ColumnAllocator()
        self._w2_rows = ColumnAllocator()
        self._wide_w2_bias = self.w2_bias

    # -- other base weights ----------------------------------------------------------------------

    def suspend(self) -> None:
        """See `CPULoRAExperts.suspend`: drop the columns and rows that were appended."""
        for slot in list(self._w13_columns.regions):
            self._suspended[slot] = self.rank_of(slot)
        w13, w2 = self._layer.w13_weight, self._layer.w2_weight
        if self._w13_columns.capacity:
            wide = w13.data
            w13.data = wide.new_empty(*wide.shape[:2], self._hidden)
            blocks(w13.data).copy_(blocks(wide)[:, :, : self._hidden * PACK_ROWS])
            w2.data = w2.data[:, : self._hidden].clone()
        self._w13_columns, self._w2_rows = ColumnAllocator(), ColumnAllocator()
        self._wide_w2_bias = self.w2_bias

    def before_load(self, param: torch.Tensor) -> None:
        """Unpack the weights if ``param``, into which weights are to be loaded, is one of them."""
        w13, w2 = self._layer.w13_weight, self._layer.w2_weight
        if not getattr(param, PACKED, False) or (param is not w13 and param is not w2):
            return
        self.suspend()
        inner = self.moe_config.intermediate_size_per_partition  # type: ignore[attr-defined]
        gate, up = unpack(w13.data, self.isa).chunk(2, 1)
        w13.data = torch.cat([gate[:, :inner], up[:, :inner]], 1)
        w2.data = unpack(w2.data, self.isa)[:, :, :inner].contiguous()
        setattr(w13, PACKED, False)
        setattr(w2, PACKED, False)

    def _resume(self) -> None:
        """Pack weights that were loaded, and write the factors of the slots into them again."""
        with torch.inference_mode(False), torch.no_grad():
            self.process_weights_after_loading(self._layer)
            for slot, rank in list(self._suspended.items()):
                self.slot_written(self._wrapper, slot, rank)

    def current(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CPULoRAExperts.current`."""
        if not self._suspended and getattr(w1, PACKED, False):
            return w1, w2
        self._resume()
        return self._layer.w13_weight, self._layer.w2_weight

    # -- slots ---------------------------------------------------------------------------------

    def slot_written(self, wrapper: Any, slot: int, rank: int) -> None:
        """Copy B13 and A2 of ``slot`` from the LoRA layer's stacks into the packed weights."""
        self.slot_cleared(slot)
        super().slot_written(wrapper, slot, rank)
        self._wrapper = wrapper
        b13 = self._w13_b(wrapper, slot, rank)
        first, grows = self._w13_columns.take(slot, round_up(b13.shape[2], PACK_COLUMNS))
        if grows:
            self._grow_w13()
        start, stop = self._hidden + first, self._hidden + first + b13.shape[2]
        target = blocks(self._layer.w13_weight.data)[:, :, start * PACK_ROWS : stop * PACK_ROWS]
        target.copy_(blocks(pack(b13, self.isa))[:, :, : target.shape[2]])

        a2 = wrapper.w2_lora_a_stacked[0].slot(slot)
        first, grows = self._w2_rows.take(slot, round_up(rank, PACK_ROWS))
        if grows:
            self._grow_w2()
        w2 = self._layer.w2_weight.data
        a2 = torch.nn.functional.pad(a2.to(w2.dtype), (0, w2.shape[2] - a2.shape[2]))
        start = self._hidden + first
        stop = start + round_up(rank, PACK_ROWS)
        w2[:, start:stop].copy_(pack(a2, self.isa)[:, : stop - start])

    def slot_cleared(self, slot: int) -> None:
        self._suspended.pop(slot, None)
        self._w13_columns.release(slot)
        self._w2_rows.release(slot)
        super().slot_cleared(slot)

    def _w13_b(self, wrapper: Any, slot: int, rank: int) -> torch.Tensor:
        """Return B13 of ``slot`` as columns to append to w13: [experts, rows of w13, columns].

        With two slices (gate and up have an A each) the columns are [B_gate 0; 0 B_up]. With one
        slice (fused gate_up) they are B_gate_up. The rows are those of w13: all of gate, then all
        of up, each padded to the operator's alignment; or gate and up interleaved (gpt-oss).
        """
        stacks = wrapper.w13_lora_b_stacked
        w13 = self._layer.w13_weight
        experts, rows = w13.shape[:2]
        out = torch.zeros(experts, rows, rank * len(stacks), dtype=w13.dtype)
        half, own = rows // 2, wrapper.intermediate_size_per_partition
        interleaved = self._interleaved()
        if len(stacks) == 1:
            b = stacks[0].slot(slot).to(w13.dtype)
            if interleaved or b.shape[1] == rows:
                out[:, : b.shape[1]] = b
            else:
                out[:, :own], out[:, half : half + own] = b[:, :own], b[:, own:]
            return out
        for index, stack in enumerate(stacks):
            b = stack.slot(slot).to(w13.dtype)
            columns = out[:, :, index * rank : (index + 1) * rank]
            if interleaved:
                columns[:, index : 2 * own : 2] = b
            else:
                columns[:, index * half : index * half + own] = b
        return out

    def _interleaved(self) -> bool:
        """Return whether the rows of gate and up alternate in w13; gpt-oss' activation says so."""
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        return self.moe_config.activation == MoEActivation.SWIGLUOAI  # type: ignore[attr-defined]

    def _grow_w13(self) -> None:
        wide = self._hidden + self._w13_columns.capacity
        self._layer.w13_weight.data = widen_columns(self._layer.w13_weight.data, wide)

    def _grow_w2(self) -> None:
        wide = self._hidden + self._w2_rows.capacity
        self._layer.w2_weight.data = widen_rows(self._layer.w2_weight.data, wide)
        if self.w2_bias is not None:
            self._wide_w2_bias = torch.nn.functional.pad(
                self.w2_bias, (0, wide - self.w2_bias.shape[1])
            )

    # -- compute -------------------------------------------------------------------------------

    def _run_operator(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        unweighted: bool,
    ) -> None:
        """Call `cpu_fused_moe` with the widened weights.

        Args:
            out: [tokens, rows of w2], is overwritten.
            x: [tokens, columns of w13].
            topk_weights, topk_ids: [tokens, top_k].
            activation: upstream's `MoEActivation`.
            unweighted: sum the experts' outputs without ``topk_weights``.
        """
        _operators().cpu_fused_moe(
            out,
            x,
            self._layer.w13_weight,
            self._layer.w2_weight,
            self.w1_bias,
            self._wide_w2_bias,
            topk_weights,
            topk_ids,
            activation.value,
            self.isa,
            unweighted,
        )

    def apply_base(self, output: torch.Tensor, hidden_states: torch.Tensor, *args: Any) -> None:
        if not self._w13_columns.capacity:
            super().apply_base(output, hidden_states, *args)
            return
        _, _, topk_weights, topk_ids, activation, *_, unweighted = args
        # The weights are widened, but the input is 0 in the appended columns, and the appended rows
        # of the output are dropped. The rest is the same fp32 sum with zeros added at its end, so
        # it has the same bits as without LoRA.
        x = self._widened_input(hidden_states)
        out = output.new_empty(output.shape[0], self._hidden + self._w2_rows.capacity)
        self._run_operator(out, x, topk_weights, topk_ids, activation, unweighted)
        output.copy_(out[:, : self._hidden])

    def _widened_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return a copy of [tokens, hidden] with zeros in w13's appended columns."""
        width = self._hidden + self._w13_columns.capacity
        x = hidden_states.new_empty(hidden_states.shape[0], width)
        x[:, : self._hidden] = hidden_states
        x[:, self._hidden :] = 0
        return x

    def apply_lora(
        self,
        plan: PairPlan,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        router_weight_on_input: bool,
    ) -> torch.Tensor:
        """See `CPULoRAExperts.apply_lora`."""
        context = self._lora_context
        assert context is not None
        x = self._widened_input(hidden_states.index_select(0, plan.tokens()))
        narrow = x[:, : self._hidden]
        ranks = {slot: self.rank_of(slot) for slot in plan.slot_set()}
        rank = max(ranks.values())
        z = [shrink(narrow, a, plan, rank) for a in context.w13_lora_a_stacked]
        self._write_shrunk(x, z, ranks, plan)

        out = x.new_empty(len(plan), self._hidden + self._w2_rows.capacity)
        ids = plan.experts.to(topk_ids.dtype).unsqueeze(1)
        ones = topk_weights.new_ones(len(plan), 1)
        # Each pair is a token of its own with one expert, so nothing is summed here.
        self._run_operator(out, x, ones, ids, activation, True)

        y = out[:, : self._hidden]
        z2 = self._read_shrunk(out, rank, ranks, plan)
        expand_add(y, z2, context.w2_lora_b_stacked[0], plan)
        return combine(y, None if router_weight_on_input else topk_weights, plan)

    def apply_native(
        self,
        pairs: Pairs,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        router_weight_on_input: bool,
    ) -> bool:
        """See `CPULoRAExperts.apply_native`."""
        context = self._lora_context
        assert context is not None
        slots = range(self._ranks.numel())
        x = hidden_states.new_empty(len(pairs), self._hidden + self._w13_columns.capacity)
        columns = [self._w13_columns.regions.get(slot, (0, 0))[0] for slot in slots]
        if not pairs.before(hidden_states, x, columns, context.w13_lora_a_stacked):
            return False
        count = len(pairs)
        out = x.new_empty(count, self._hidden + self._w2_rows.capacity)
        # Of few pairs they are kept: steps of decoding have few sizes.
        ones = (_ones if count <= KEPT else _ones.__wrapped__)(count, topk_weights.dtype)
        # Each pair is a token of its own with one expert, so nothing is summed here.
        self._run_operator(out, x, ones, pairs.ids, activation, True)
        columns = [self._w2_rows.regions.get(slot, (0, 0))[0] for slot in slots]
        weights = None if router_weight_on_input else topk_weights
        lora_b = context.w2_lora_b_stacked[0]
        return pairs.after(out, output, columns, lora_b, self.highest_rank, weights)

    def _write_shrunk(
        self, x: torch.Tensor, z: list[torch.Tensor], ranks: dict[int, int], plan: PairPlan
    ) -> None:
        """Write A13·x of each pair into the columns that B13 of its slot has in w13.

        Args:
            x: [pairs, columns of w13], the widened input; it is changed.
            z: A13·x, one [pairs, rank] per slice.
            ranks: slot -> rank of its adapter.
            plan: the pairs.
        """
        for slot, rank in ranks.items():
            first = self._hidden + self._w13_columns.regions[slot][0]
            rows = slice(None) if len(ranks) == 1 else plan.pairs_of(slot)
            for index, part in enumerate(z):
                start = first + index * rank
                x[rows, start : start + rank] = part[rows, :rank]

    def _read_shrunk(
        self, out: torch.Tensor, rank: int, ranks: dict[int, int], plan: PairPlan
    ) -> torch.Tensor:
        """Read A2·h of each pair from the rows that A2 of its slot has in w2.

        Args:
            out: [pairs, rows of w2], the operator's output.
            rank: the highest rank of the batch.
            ranks: slot -> rank of its adapter.
            plan: the pairs.

        Returns:
            [pairs, rank], with zeros beyond the rank of the pair's own adapter.
        """
        z = out.new_zeros(len(plan), rank)
        for slot, own in ranks.items():
            first = self._hidden + self._w2_rows.regions[slot][0]
            rows = slice(None) if len(ranks) == 1 else plan.pairs_of(slot)
            z[rows, :own] = out[rows, first : first + own]
        return z
