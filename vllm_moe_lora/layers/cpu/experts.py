"""What every LoRA-capable CPU experts class shares: the slot protocol and the split of a batch.

vLLM's `FusedMoEWithLoRA` keeps the factors in its stacks and hands them over as a
`MoELoRAContext`; hooks/lora_layers_fused_moe.py calls `slot_written` / `slot_cleared` after each
change. `apply` sends base tokens through upstream's own code, so they get the very bits they get
without LoRA, and only tokens with an adapter through `apply_lora`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...kernels.cpu import PairPlan, make_plan

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext


def token_slots(context: MoELoRAContext, num_tokens: int) -> torch.Tensor:
    """[num_tokens] int64 adapter slot of each token, -1 where it has none (padding included)."""
    slots: torch.Tensor = context.punica_wrapper.token_lora_indices
    if slots.numel() >= num_tokens:
        return slots[:num_tokens]
    return torch.nn.functional.pad(slots, (0, num_tokens - slots.numel()), value=-1)


def combine(pairs: torch.Tensor, topk_weights: torch.Tensor | None, plan: PairPlan) -> torch.Tensor:
    """Weighted sum over the experts of each token, in fp32: [pairs, out] -> [rows, out]."""
    y = plan.in_turn(pairs)
    if topk_weights is None:
        weights = torch.ones(y.shape[:2], dtype=torch.float32)
    else:
        weights = topk_weights.index_select(0, plan.rows).to(torch.float32)
    if plan.valid is not None:
        weights = weights * plan.in_turn(plan.valid)
    return torch.bmm(weights.unsqueeze(1), y.to(torch.float32)).squeeze(1)


def refuse_expert_parallel(config: Any) -> None:
    """
    Args:
        config: a layer's `FusedMoEConfig`.

    Raises:
        NotImplementedError: experts are spread over ranks. Upstream's CPU operators take the
            router's numbers for places among a rank's experts and write past them.
    """
    if config.moe_parallel_config.use_ep:
        raise NotImplementedError(
            "vLLM's CPU experts do not know which experts are on other ranks, with or without "
            "LoRA, and --enable-lora is not to hide it: start without --enable-expert-parallel, "
            "which shares each expert among the ranks instead."
        )


class CPULoRAExperts:
    """Mixin over an upstream CPU experts class; the subclass implements `apply_lora`."""

    _lora_context: MoELoRAContext | None = None
    _ranks: torch.Tensor = torch.zeros(0, dtype=torch.int64)  # [slots] rank in use, 0 = empty

    @staticmethod
    def supports_lora() -> bool:
        return True

    moe_config: Any  # upstream's, of the layer

    def set_lora_context(self, context: MoELoRAContext) -> None:
        refuse_expert_parallel(self.moe_config)
        self._lora_context = context

    def slot_written(self, wrapper: Any, slot: int, rank: int) -> None:
        """An adapter of ``rank`` now stands in ``slot`` of the wrapper's stacks."""
        self._set_rank(slot, rank)

    def slot_cleared(self, slot: int) -> None:
        """``slot`` holds no adapter any more, or one without LoRA on this layer's experts."""
        self._set_rank(slot, 0)

    def _set_rank(self, slot: int, rank: int) -> None:
        ranks = self._ranks
        if slot >= ranks.numel():
            ranks = torch.nn.functional.pad(ranks, (0, slot + 1 - ranks.numel()))
        self._ranks = ranks.index_fill(0, torch.tensor([slot]), rank)

    def plan_batch(self, num_tokens: int, topk_ids: torch.Tensor) -> PairPlan | None:
        context = self._lora_context
        # hooks/lora_punica_cpu.py says once a batch which adapters are in it.
        if context is None or getattr(context.punica_wrapper, "token_segments", None) == []:
            return None
        if not self._ranks.any():
            return None
        slots = token_slots(context, num_tokens)
        # Slots without LoRA on these experts are base requests here. Slot -1 reads the last
        # entry, and stays -1 either way.
        ranks = torch.nn.functional.pad(self._ranks, (0, context.max_loras + 1))
        slots = slots.masked_fill(ranks[slots] == 0, -1)
        return make_plan(slots, topk_ids, context.local_num_experts)

    def rank_of(self, slot: int) -> int:
        return int(self._ranks[slot])

    def apply_base(self, output: torch.Tensor, *args: Any) -> None:
        """Upstream's own apply over base tokens only."""
        super().apply(output, *args)  # type: ignore[misc]

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
        """Output of the tokens ``plan.rows``: [rows, hidden] in fp32 or hidden_states' dtype."""
        raise NotImplementedError

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Same signature and meaning as upstream's `FusedMoEExpertsModular.apply`."""
        plan = self.plan_batch(hidden_states.shape[0], topk_ids)
        rest = (
            activation,
            global_num_experts,
            expert_map,
            a1q_scale,
            a2_scale,
            workspace13,
            workspace2,
            expert_tokens_meta,
            apply_router_weight_on_input,
        )
        if plan is None:
            self.apply_base(output, hidden_states, w1, w2, topk_weights, topk_ids, *rest)
            return
        with_lora = self.apply_lora(
            plan,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            apply_router_weight_on_input,
        )
        if plan.rows.numel() == hidden_states.shape[0]:
            output.copy_(with_lora)
            return
        base = torch.ones(hidden_states.shape[0], dtype=torch.bool)
        base[plan.rows] = False
        rows = base.nonzero().flatten()
        part = output.new_empty(rows.numel(), output.shape[1])
        self.apply_base(
            part, hidden_states[rows], w1, w2, topk_weights[rows], topk_ids[rows], *rest
        )
        output[rows] = part
        output[plan.rows] = with_lora.to(output.dtype)
