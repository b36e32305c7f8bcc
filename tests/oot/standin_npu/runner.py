"""Routing and experts in plain torch, with the LoRA delta where a context has been published."""

from __future__ import annotations

import torch
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder


class StandInRunner(MoERunner):
    _lora = None  # the LoRA layer around this runner, whose stacks are read

    def set_lora_context(self, layer) -> None:
        object.__setattr__(self, "_lora", layer)  # no submodule: it has this one as its own

    def _apply_quant_method(
        self, hidden_states, router_logits, shared_experts_input, *args, **more
    ):
        self._maybe_apply_shared_experts(shared_experts_input, SharedExpertsOrder.NO_OVERLAP)
        weights = router_logits.float().softmax(-1)
        weights, ids = weights.topk(self.router.top_k)
        if self.router.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        shared = self._shared_experts.output if self._shared_experts is not None else None
        return shared, self._experts(hidden_states, weights, ids)

    def _experts(self, x, weights, ids):
        layer, out = self.routed_experts, torch.zeros_like(x)
        slots = self._slots(x.shape[0])
        for expert in ids.unique().tolist():
            for slot in slots.unique().tolist():
                rows, place = ((ids == expert) & (slots == slot)[:, None]).nonzero(as_tuple=True)
                if not rows.numel():
                    continue
                mine = x[rows]
                h = mine @ layer.w13_weight[expert].T + self._delta("w13", mine, slot, expert)
                h = self._activation(h + (layer.w13_bias[expert] if self._biased else 0))
                y = h @ layer.w2_weight[expert].T + self._delta("w2", h, slot, expert)
                y = y + (layer.w2_bias[expert] if self._biased else 0)
                out.index_add_(0, rows, y * weights[rows, place, None].to(y.dtype))
        return out

    @property
    def _biased(self) -> bool:
        return hasattr(self.routed_experts, "w13_bias")

    def _activation(self, h):
        if self.activation == MoEActivation.SWIGLUOAI:
            gate, up = h[:, ::2].clamp(max=7.0), h[:, 1::2].clamp(-7.0, 7.0)
            return (up + 1) * gate * torch.sigmoid(1.702 * gate)
        assert self.activation == MoEActivation.SILU
        gate, up = h.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def _slots(self, tokens):
        if self._lora is None:
            return torch.full((tokens,), -1)
        slots = self._lora.punica_wrapper.token_lora_indices[:tokens]
        return torch.nn.functional.pad(slots, (0, tokens - slots.numel()), value=-1)

    def _delta(self, which, x, slot, expert):
        if slot < 0 or not self._lora.adapter_enabled[slot]:
            return 0
        pairs = zip(
            getattr(self._lora, f"{which}_lora_a_stacked"),
            getattr(self._lora, f"{which}_lora_b_stacked"),
            strict=True,
        )
        return torch.cat([x @ a[slot, expert].T @ b[slot, expert].T for a, b in pairs], -1)


def register() -> None:
    """Any number of times."""
    if "MoERunner" not in op_registry_oot:
        PluggableLayer.register_oot(StandInRunner, name="MoERunner")
