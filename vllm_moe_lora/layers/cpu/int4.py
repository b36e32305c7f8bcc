"""LoRA on INT4 experts (GPTQ, AWQ, compressed-tensors) on the CPU, in vLLM 0.30 to 0.33.

Tokens without an adapter run vLLM's fused operator `fused_experts_cpu`, as without LoRA. It has no
place to add LoRA before the activation. So tokens with an adapter run vLLM's operator for a single
matrix, `int4_scaled_mm_cpu`, expert by expert, over the same packed weights.

Upstream uses its INT4 experts class only on CPUs with AMX. Both operators also run on AVX-512 with
VNNI, so the class with LoRA is offered there, too. `operators_work` first checks their result
against the product with dequantised weights.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.cpu import PairPlan, expand_add, shrink
from ...kernels.native.calls import fit
from ...kernels.native.pairs import ExpertLora, Pairs, dense_segments, merge_experts
from .experts import CPULoRAExperts, combine

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext


@functools.cache
def operators_work() -> bool:
    """Return whether vLLM's INT4 operators exist and work on this CPU, with AMX or without.

    Without AMX, a small product is computed and compared. The answer is kept for the process.
    """
    from vllm.platforms import CpuArchEnum, current_platform

    names = ("fused_experts_cpu", "int4_scaled_mm_cpu", "convert_weight_packed_scale_zp")
    if not all(hasattr(torch.ops._C, name) for name in names):
        return False
    if current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        return False
    if torch.cpu._is_amx_tile_supported():
        return True
    if not torch.cpu._is_vnni_supported():
        return False
    with torch.device("cpu"):  # the default device may be "meta" while a model is built
        return _product_is_right()


def _product_is_right() -> bool:
    """Compare `int4_scaled_mm_cpu` with the product of dequantised weights.

    Activations are quantised to 8 bits inside the operator, so up to 5 % of difference is allowed.
    """
    from vllm import _custom_ops as ops

    rows, columns, group = 64, 128, 64
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=generator)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    packed = (q.view(rows, columns // 8, 8) << shifts).sum(-1).to(torch.int32).t().contiguous()
    scales = torch.rand(columns // group, rows, generator=generator).to(torch.bfloat16)
    zeros = torch.full((columns // group, rows // 8), 0x77777777, dtype=torch.int32)
    w, z, s = ops.convert_weight_packed_scale_zp(
        packed[None], zeros[None], scales[None], ops.CPUQuantAlgo.GPTQ
    )
    x = torch.randn(4, columns, generator=generator).to(torch.bfloat16)
    got = ops.int4_scaled_mm_cpu(x, w[0], z[0], s[0], None).float()
    want = x.float() @ ((q - 8) * scales.float().t().repeat_interleave(group, 1)).t()
    return bool(((got - want).abs().mean() / want.abs().mean()) < 0.05)


# A projection's packed weights, zeros and scales of each expert.
Views = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _matmul(x: torch.Tensor, experts: Views, slices: list[tuple[int, int, int]]) -> torch.Tensor:
    """Multiply each pair's row with the weights of its expert.

    Args:
        x: [pairs, in], sorted by expert.
        experts: of this projection.
        slices: (expert, first pair, one past the last pair); they cover all pairs.

    Returns:
        [pairs, out].
    """
    if not slices:
        blocks = experts[0][2].shape  # scales of columns in blocks: all blocks are all of y
        return x.new_empty(0, blocks[0] * blocks[-1])
    product = torch.ops._C.int4_scaled_mm_cpu.default
    rows = x.split([stop - start for _, start, stop in slices])
    # In a step of decoding this is a call for every few tokens: whatever is around it counts.
    return torch.cat(
        [product(row, *experts[e], None) for row, (e, _, _) in zip(rows, slices, strict=True)]
    )


class Int4CPUExperts(CPULoRAExperts):
    """Mixin that adds LoRA to upstream's `CPUExpertsInt4`.

    ``w1_scale``, ``w2_scale``, ``w1_zp`` and ``w2_zp`` are upstream's packed scales and zeros.
    """

    w1_scale: torch.Tensor
    w2_scale: torch.Tensor
    w1_zp: torch.Tensor
    w2_zp: torch.Tensor
    _views: dict[str, tuple[tuple[int, ...], Views]]

    def set_lora_context(self, context: MoELoRAContext) -> None:
        """See `CPULoRAExperts.set_lora_context`."""
        super().set_lora_context(context)
        self._views = {}
        self._lora13, self._lora2 = ExpertLora(), ExpertLora()

    def _experts(self, name: str, w: torch.Tensor) -> Views:
        """Return the weights of each expert; ``name`` is "w1" or "w2".

        They are views, and kept, because making 150 of them for each layer of a step costs time.
        If weights were loaded to another place, the views are made anew.
        """
        z, s = getattr(self, f"{name}_zp"), getattr(self, f"{name}_scale")
        places = w.data_ptr(), z.data_ptr(), s.data_ptr()
        known = self._views.get(name)
        if known is None or known[0] != places:
            known = places, list(zip(w.unbind(), z.unbind(), s.unbind(), strict=True))
            self._views[name] = known
        return known[1]

    @staticmethod
    def _supports_current_device() -> bool:
        from vllm.platforms import current_platform

        return bool(current_platform.is_cpu()) and operators_work()

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        """Allow upstream's scheme, and also compressed-tensors with a group size of 32."""
        from vllm.model_executor.layers.quantization.utils import quant_utils as q

        return weight_key in (q.kInt4Static, q.kInt4Static32) and activation_key is None

    @staticmethod
    def _supports_routing_method(method: Any, weight_key: Any, activation_key: Any) -> bool:
        """Allow any: the operators get the chosen experts and their weights.

        Upstream's own class refuses DeepSeek's routing, which Kimi K2.5 has.
        """
        return True

    @staticmethod
    def is_supported_config(cls: type[Any], moe_config: Any, *keys: Any) -> tuple[bool, str | None]:
        """Apply upstream's rules, and refuse without LoRA: upstream's own class then runs."""
        if not moe_config.is_lora_enabled:
            return False, "LoRA is off"
        return super().is_supported_config(cls, moe_config, *keys)  # type: ignore[misc]

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
        a13, b13 = context.w13_lora_a_stacked, context.w13_lora_b_stacked
        a2, b2 = context.w2_lora_a_stacked, context.w2_lora_b_stacked
        if not fit(hidden_states, output):
            return False
        order, found = pairs.sorted()
        slices, segments = merge_experts(found), dense_segments(found, a2[0].shape[0])
        rows = order // topk_ids.shape[1]  # among the tokens with an adapter
        x = hidden_states.index_select(0, rows if pairs.all_tokens else pairs.rows[rows])
        gate_up = _matmul(x, self._experts("w1", w1), slices)
        if not self._lora13.add(gate_up, x, a13, b13, segments):
            return False
        h = gate_up.new_empty(x.shape[0], gate_up.shape[1] // 2)
        torch.ops._C.silu_and_mul(h, gate_up)
        y = _matmul(h, self._experts("w2", w2), slices)
        if not self._lora2.add(y, h, a2, b2, segments):
            return False
        weighted = y.to(torch.float32)
        if not router_weight_on_input:
            weights = topk_weights if pairs.all_tokens else topk_weights[pairs.rows]
            weighted *= weights.flatten().index_select(0, order).to(torch.float32).unsqueeze(1)
        total = torch.zeros(pairs.rows.numel(), output.shape[1], dtype=torch.float32)
        total.index_add_(0, rows, weighted)
        if pairs.all_tokens:
            output.copy_(total)
        else:
            output.index_copy_(0, pairs.rows, total.to(output.dtype))
        return True

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
        rank = max(self.rank_of(slot) for slot in plan.slot_set())
        x = hidden_states.index_select(0, plan.tokens())
        slices = plan.expert_slices()
        gate_up = _matmul(x, self._experts("w1", w1), slices)
        start = 0
        for a, b in zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True):
            part = gate_up[:, start : start + b.shape[2]]
            expand_add(part, shrink(x, a, plan, rank), b, plan)
            start += b.shape[2]
        h = gate_up.new_empty(len(plan), gate_up.shape[1] // 2)
        torch.ops._C.silu_and_mul(h, gate_up)
        y = _matmul(h, self._experts("w2", w2), slices)
        z = shrink(h, context.w2_lora_a_stacked[0], plan, rank)
        expand_add(y, z, context.w2_lora_b_stacked[0], plan)
        return combine(y, None if router_weight_on_input else topk_weights, plan)
