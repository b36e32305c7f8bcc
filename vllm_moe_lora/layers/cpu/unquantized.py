"""LoRA through vLLM's closed fused CPU MoE operator, by widening its weights.

`cpu_fused_moe` computes w2·act(w13·x) and the weighted sum in one call and shows nothing in
between, so a delta cannot be added before the activation. But

    [W13 | B13] · [x ; A13·x]  =  W13·x + B13·(A13·x)      and      [W2 ; A2] · h  =  [W2·h ; A2·h]

so B13 becomes extra input columns of w13, A2 extra output rows of w2, and B2 is applied after
the call. The delta joins before the activation in the operator's own fp32 accumulator. The
packed layout keeps blocks of 16 output rows with all their input columns together (checked once a
process by `layout_is_plain`), so columns and rows are written into the packed weights in place,
with no second copy of the experts. Columns exist only for the adapters in slots, at their own
rank; without an adapter the weights are upstream's, untouched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...kernels.cpu import PairPlan, expand_add, shrink
from .columns import ColumnAllocator
from .experts import CPULoRAExperts, combine

PACK_ROWS = 16  # output rows that the operator packs together, on every instruction set it has
PACK_COLUMNS = 8  # a multiple of the input columns packed together (2 on AMX and VSX, 4 on NEON)
PACK_UNIT = 32  # the operator packs and multiplies whole units of rows and columns


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _pack(weight: torch.Tensor, isa: str) -> torch.Tensor:
    """Pack [E, out, in], zero-padded to whole units; the packed shape is the padded one."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    pad = torch.nn.functional.pad
    weight = pad(weight, (0, -weight.shape[2] % PACK_UNIT, 0, -weight.shape[1] % PACK_UNIT))
    return cpu_prepack_moe_weight(weight.contiguous(), isa)


def _blocks(packed: torch.Tensor) -> torch.Tensor:
    """[E, out, in] packed -> [E, out / 16, in * 16]: a column range is a slice of the last axis."""
    experts, rows, columns = packed.shape
    return packed.view(experts, rows // PACK_ROWS, columns * PACK_ROWS)


@functools.cache
def layout_is_plain(isa: str, dtype: torch.dtype) -> bool:
    """Whether packing commutes with appending columns and rows (the property used here)."""
    w = torch.randn(1, 64, 64).to(dtype)
    whole, cut = _pack(w, isa), PACK_UNIT + PACK_COLUMNS
    left, right = _pack(w[:, :, :cut], isa), _pack(w[:, :, cut:], isa)
    keep, rest = cut * PACK_ROWS, (64 - cut) * PACK_ROWS
    columns = torch.cat([_blocks(left)[:, :, :keep], _blocks(right)[:, :, :rest]], dim=2)
    cut = PACK_UNIT + PACK_ROWS
    rows = torch.cat([_pack(w[:, :cut], isa)[:, :cut], _pack(w[:, cut:], isa)[:, :PACK_ROWS]], 1)
    return torch.equal(columns.view_as(whole), whole) and torch.equal(rows, whole)


def widen_columns(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Append zero input columns to a packed weight until it has ``columns`` of them."""
    experts, rows, have = packed.shape
    wide = packed.new_zeros(experts, rows, columns)
    _blocks(wide)[:, :, : have * PACK_ROWS].copy_(_blocks(packed))
    return wide


def widen_rows(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """Append zero output rows to a packed weight until it has ``rows`` of them."""
    wide = packed.new_zeros(packed.shape[0], rows, packed.shape[2])
    wide[:, : packed.shape[1]].copy_(packed)
    return wide


class WidenedCPUExperts(CPULoRAExperts):
    """Mixin over `CPUUnquantizedExperts` and its x86 (AMX), Arm and Power kin."""

    isa: str
    w1_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
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
        self._layer = layer
        self._hidden = layer.w13_weight.shape[2]
        self._w13_columns = ColumnAllocator()
        self._w2_rows = ColumnAllocator()
        self._wide_w2_bias = self.w2_bias

    # -- slots ---------------------------------------------------------------------------------

    def slot_written(self, wrapper: Any, slot: int, rank: int) -> None:
        """Copy B13 and A2 of ``slot`` from the wrapper's stacks into the widened weights."""
        self.slot_cleared(slot)
        super().slot_written(wrapper, slot, rank)
        b13 = self._w13_b(wrapper, slot, rank)
        first, grows = self._w13_columns.take(slot, _round_up(b13.shape[2], PACK_COLUMNS))
        if grows:
            self._grow_w13()
        start, stop = self._hidden + first, self._hidden + first + b13.shape[2]
        target = _blocks(self._layer.w13_weight.data)[:, :, start * PACK_ROWS : stop * PACK_ROWS]
        target.copy_(_blocks(_pack(b13, self.isa))[:, :, : target.shape[2]])

        a2 = wrapper.w2_lora_a_stacked[0][slot][:, :rank]
        first, grows = self._w2_rows.take(slot, _round_up(rank, PACK_ROWS))
        if grows:
            self._grow_w2()
        w2 = self._layer.w2_weight.data
        a2 = torch.nn.functional.pad(a2.to(w2.dtype), (0, w2.shape[2] - a2.shape[2]))
        start = self._hidden + first
        stop = start + _round_up(rank, PACK_ROWS)
        w2[:, start:stop].copy_(_pack(a2, self.isa)[:, : stop - start])

    def slot_cleared(self, slot: int) -> None:
        self._w13_columns.release(slot)
        self._w2_rows.release(slot)
        super().slot_cleared(slot)

    def _w13_b(self, wrapper: Any, slot: int, rank: int) -> torch.Tensor:
        """[E, w13 rows, columns]: B13 as columns, gate and up side by side when A differs.

        With two slices (own A each) the columns are [B_gate 0; 0 B_up], with a fused gate_up one
        block. Rows follow the operator's weight: gate then up, each padded to the kernel's
        alignment, or interleaved (gpt-oss).
        """
        stacks = wrapper.w13_lora_b_stacked
        w13 = self._layer.w13_weight
        experts, rows = w13.shape[:2]
        out = torch.zeros(experts, rows, rank * len(stacks), dtype=w13.dtype)
        half, own = rows // 2, wrapper.intermediate_size_per_partition
        interleaved = self._interleaved()
        if len(stacks) == 1:
            b = stacks[0][slot][:, :, :rank].to(w13.dtype)
            if interleaved or b.shape[1] == rows:
                out[:, : b.shape[1]] = b
            else:
                out[:, :own], out[:, half : half + own] = b[:, :own], b[:, own:]
            return out
        for index, stack in enumerate(stacks):
            b = stack[slot][:, :, :rank].to(w13.dtype)
            columns = out[:, :, index * rank : (index + 1) * rank]
            if interleaved:
                columns[:, index : 2 * own : 2] = b
            else:
                columns[:, index * half : index * half + own] = b
        return out

    def _interleaved(self) -> bool:
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

    def _call(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        unweighted: bool,
    ) -> None:
        from vllm._custom_ops import cpu_fused_moe

        cpu_fused_moe(
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
        # Zero columns and ignored rows change no bit of the others: every output element is the
        # same fp32 sum, with zeros added at its end.
        x = self._widened_input(hidden_states)
        out = output.new_empty(output.shape[0], self._hidden + self._w2_rows.capacity)
        self._call(out, x, topk_weights, topk_ids, activation, unweighted)
        output.copy_(out[:, : self._hidden])

    def _widened_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
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
        context = self._lora_context
        assert context is not None
        x = self._widened_input(hidden_states.index_select(0, plan.tokens()))
        narrow = x[:, : self._hidden]
        ranks = {slot: self.rank_of(slot) for slot in plan.slot_set()}
        rank = max(ranks.values())
        z = [shrink(narrow, a[:, :, :rank], plan) for a in context.w13_lora_a_stacked]
        self._scatter(x, z, ranks, plan)

        out = x.new_empty(len(plan), self._hidden + self._w2_rows.capacity)
        ids = plan.experts.to(topk_ids.dtype).unsqueeze(1)
        ones = topk_weights.new_ones(len(plan), 1)
        self._call(out, x, ones, ids, activation, True)

        y = out[:, : self._hidden]
        z2 = self._gather(out, rank, ranks, plan)
        expand_add(y, z2, context.w2_lora_b_stacked[0][:, :, :, :rank], plan)
        return combine(y, None if router_weight_on_input else topk_weights, plan)

    def _scatter(
        self, x: torch.Tensor, z: list[torch.Tensor], ranks: dict[int, int], plan: PairPlan
    ) -> None:
        """Write each pair's z into the columns of its slot."""
        for slot, rank in ranks.items():
            first = self._hidden + self._w13_columns.regions[slot][0]
            rows = slice(None) if len(ranks) == 1 else plan.pairs_of(slot)
            for index, part in enumerate(z):
                start = first + index * rank
                x[rows, start : start + rank] = part[rows, :rank]

    def _gather(
        self, out: torch.Tensor, rank: int, ranks: dict[int, int], plan: PairPlan
    ) -> torch.Tensor:
        """Read each pair's A2·h from the output rows of its slot; [pairs, rank], zero padded."""
        z = out.new_zeros(len(plan), rank)
        for slot, own in ranks.items():
            first = self._hidden + self._w2_rows.regions[slot][0]
            rows = slice(None) if len(ranks) == 1 else plan.pairs_of(slot)
            z[rows, :own] = out[rows, first : first + own]
        return z
