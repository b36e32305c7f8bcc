"""vLLM 0.11.1 and 0.11.2 on a CPU: routed experts with LoRA, in torch's own operators.

Upstream's wrapper knows Triton kernels only. Here the layer's CPU operator is called for base
tokens, as it is without LoRA, and tokens with an adapter are computed expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CPUFusedMoEWithLoRA:
    """Stands where the layer has its ``cpu_fused_moe``.

    Args:
        base: what stood there.
        wrapper: the `FusedMoEWithLoRA`, whose stacks are read:
            w1 and w3 a [slots, experts, rank, hidden], b [slots, experts, inner, rank];
            w2 a [slots, experts, rank, inner], b [slots, experts, hidden, rank].
    """

    def __init__(self, base: Callable[..., torch.Tensor], wrapper: Any) -> None:
        self._base, self._wrapper = base, wrapper

    def __call__(
        self,
        layer: Any,
        x: torch.Tensor,
        use_grouped_topk: bool,
        top_k: int,
        router_logits: torch.Tensor,
        *args: Any,
        **more: Any,
    ) -> torch.Tensor:
        slots = self._slots(x.shape[0])
        rows = (slots >= 0).nonzero().flatten()
        if not rows.numel():
            return self._base(layer, x, use_grouped_topk, top_k, router_logits, *args, **more)
        out = torch.empty_like(x)
        rest = (slots < 0).nonzero().flatten()
        if rest.numel():
            given = (x[rest], use_grouped_topk, top_k, router_logits[rest])
            out[rest] = self._base(layer, *given, *args, **more)
        weights, ids = self._routing(
            x[rows], use_grouped_topk, top_k, router_logits[rows], *args, **more
        )
        out[rows] = self._with_lora(layer, x[rows], weights, ids, slots[rows]).to(out.dtype)
        return out

    def _slots(self, tokens: int) -> torch.Tensor:
        """[tokens] adapter slot of each token, -1 where it has none on this layer."""
        slots: torch.Tensor = self._wrapper.punica_wrapper.token_lora_indices[:tokens]
        slots = torch.nn.functional.pad(slots, (0, tokens - slots.numel()), value=-1)
        return slots.masked_fill(self._wrapper.adapter_enabled[slots] == 0, -1)

    @staticmethod
    def _routing(
        x: torch.Tensor,
        use_grouped_topk: bool,
        top_k: int,
        router_logits: torch.Tensor,
        renormalize: bool,
        topk_group: int | None = None,
        num_expert_group: int | None = None,
        global_num_experts: int = -1,
        expert_map: torch.Tensor | None = None,
        custom_routing_function: Any = None,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        e_score_correction_bias: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        activation: str = "silu",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts

        if activation != "silu" or apply_router_weight_on_input:
            raise NotImplementedError(
                f"CPU MoE LoRA of vLLM 0.11 has activation silu only (this model: {activation}) "
                "and no router weight on the input"
            )
        weights, ids = select_experts(
            hidden_states=x,
            router_logits=router_logits,
            use_grouped_topk=use_grouped_topk,
            top_k=top_k,
            renormalize=renormalize,
            topk_group=topk_group,
            num_expert_group=num_expert_group,
            custom_routing_function=custom_routing_function,
            scoring_func=scoring_func,
            routed_scaling_factor=routed_scaling_factor,
            e_score_correction_bias=e_score_correction_bias,
        )
        return weights, ids

    def _with_lora(
        self,
        layer: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """[tokens, hidden] fp32, summed over experts: (W2 + B2 A2) act((W13 + B13 A13) x)."""
        out = torch.zeros(x.shape, dtype=torch.float32)
        pairs = torch.stack([slots.repeat_interleave(ids.shape[1]), ids.flatten().long()])
        for slot, expert in torch.unique(pairs, dim=1).T.tolist():
            rows, place = ((ids == expert) & (slots == slot)[:, None]).nonzero(as_tuple=True)
            mine = x[rows]
            gate, up = (mine @ layer.w13_weight[expert].T).chunk(2, dim=-1)
            gate = gate + self._delta(mine, "w1", slot, expert)
            up = up + self._delta(mine, "w3", slot, expert)
            hidden = torch.nn.functional.silu(gate) * up
            y = hidden @ layer.w2_weight[expert].T + self._delta(hidden, "w2", slot, expert)
            out.index_add_(0, rows, y.float() * weights[rows, place].float()[:, None])
        return out

    def _delta(self, x: torch.Tensor, name: str, slot: int, expert: int) -> torch.Tensor:
        a: torch.Tensor = getattr(self._wrapper, f"{name}_lora_a_stacked")[slot, expert]
        b: torch.Tensor = getattr(self._wrapper, f"{name}_lora_b_stacked")[slot, expert]
        return x @ a.to(x.dtype).T @ b.to(x.dtype).T


def install(wrapper: Any, layer: Any) -> None:
    """Put LoRA into the layer's CPU operator.

    Raises:
        NotImplementedError: the layer has none, or its weights are packed.
    """
    base = getattr(layer, "cpu_fused_moe", None)
    if base is None:
        raise NotImplementedError(
            f"{type(layer.quant_method).__name__}: the CPU backend of vLLM 0.11 runs unquantised "
            "experts only. Serve an unquantised checkpoint, or a newer vLLM."
        )
    if type(base).__name__ == "SGLFusedMOE" or layer.w13_weight.dim() != 3:
        raise NotImplementedError(
            "MoE LoRA of vLLM 0.11 on a CPU wants plain weights: set VLLM_CPU_SGL_KERNEL=0 and "
            "VLLM_CPU_MOE_PREPACK=0."
        )
    layer.cpu_fused_moe = CPUFusedMoEWithLoRA(base, wrapper)
