"""The common part of the CPU experts classes with LoRA support (vLLM 0.30 to 0.33).

vLLM's LoRA layer (`FusedMoEWithLoRA`) keeps the factors of all adapter slots in its buffers, and
gives them to its experts as a `MoELoRAContext`. hooks/lora_layers_fused_moe_slots.py calls
`slot_written` and `slot_cleared` after each change of a slot.

`apply` splits a batch. Tokens without an adapter run upstream's own `apply`, so their results are
bit for bit those without LoRA. Tokens with an adapter run `apply_lora` of the subclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...kernels.cpu import PairPlan, make_plan

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext


def token_slots(context: MoELoRAContext, num_tokens: int) -> torch.Tensor:
    """Return [num_tokens] int64, the adapter slot of each token.

    It is -1 for a token without an adapter, and for a padding token.
    """
    slots: torch.Tensor = context.punica_wrapper.token_lora_indices
    if slots.numel() >= num_tokens:
        return slots[:num_tokens]
    return torch.nn.functional.pad(slots, (0, num_tokens - slots.numel()), value=-1)


def combine(pairs: torch.Tensor, topk_weights: torch.Tensor | None, plan: PairPlan) -> torch.Tensor:
    """Sum the outputs of each token's experts, weighted by the router, in fp32.

    Args:
        pairs: [pairs, out], the output of each token-expert pair, in the plan's order.
        topk_weights: [tokens, top_k] of the whole batch; None if all weights are 1.
        plan: from `make_plan`.

    Returns:
        [rows, out] float32, one row for each token of ``plan.rows``.
    """
    y = plan.by_token(pairs)
    if topk_weights is None:
        weights = torch.ones(y.shape[:2], dtype=torch.float32)
    else:
        weights = topk_weights.index_select(0, plan.rows).to(torch.float32)
    if plan.valid is not None:
        weights = weights * plan.by_token(plan.valid)
    return torch.bmm(weights.unsqueeze(1), y.to(torch.float32)).squeeze(1)


def refuse_expert_parallel(config: Any) -> None:
    """Refuse expert parallelism, for which upstream's CPU operators give wrong results.

    The operators take the router's global expert ids for local ones, and so read and write beyond
    the end of the local experts. That happens without LoRA, too.

    Args:
        config: the layer's `FusedMoEConfig`.

    Raises:
        NotImplementedError: the layer uses expert parallelism.
    """
    if config.moe_parallel_config.use_ep:
        raise NotImplementedError(
            "vLLM's CPU experts do not support expert parallelism: they take global expert ids for "
            "local ones, with and without LoRA. Start without --enable-expert-parallel; vLLM then "
            "splits each expert among the ranks."
        )


class CPULoRAExperts:
    """Mixin that adds LoRA to an upstream CPU experts class. Subclasses implement `apply_lora`."""

    moe_config: Any  # the layer's FusedMoEConfig, set by upstream
    _lora_context: MoELoRAContext | None = None
    operator_name: str = ""  # of these experts in compiled code; layers/cpu/compiled.py sets it
    # [slots] int64, the rank of the adapter in each slot; 0 if these experts have no LoRA there.
    _ranks: torch.Tensor = torch.zeros(0, dtype=torch.int64)

    @staticmethod
    def supports_lora() -> bool:
        return True

    def set_lora_context(self, context: MoELoRAContext) -> None:
        refuse_expert_parallel(self.moe_config)
        self._lora_context = context

    def slot_written(self, wrapper: Any, slot: int, rank: int) -> None:
        """Take over an adapter that the LoRA layer has just written into its buffers.

        Args:
            wrapper: the `FusedMoEWithLoRA`.
            slot: of the adapter, from 0.
            rank: the highest rank of its factors on this layer.
        """
        self._set_rank(slot, rank)

    def slot_cleared(self, slot: int) -> None:
        """Forget ``slot``: it is empty, or its adapter has no LoRA on this layer's experts."""
        self._set_rank(slot, 0)

    def _set_rank(self, slot: int, rank: int) -> None:
        ranks = self._ranks
        if slot >= ranks.numel():
            ranks = torch.nn.functional.pad(ranks, (0, slot + 1 - ranks.numel()))
        self._ranks = ranks.index_fill(0, torch.tensor([slot]), rank)

    def plan_batch(self, num_tokens: int, topk_ids: torch.Tensor) -> PairPlan | None:
        """Collect the token-expert pairs with LoRA; None if the batch has none.

        Args:
            num_tokens: tokens of the batch, padding included.
            topk_ids: [tokens, top_k] int, local expert ids.
        """
        context = self._lora_context
        # hooks/lora_punica_cpu.py sets token_segments for each batch. [] means: no adapters.
        if context is None or getattr(context.punica_wrapper, "token_segments", None) == []:
            return None
        if not self._ranks.any():
            return None
        slots = token_slots(context, num_tokens)
        # A token whose adapter has no LoRA on these experts counts as one without an adapter. A
        # token with slot -1 reads the last entry of ranks, and keeps -1 whatever that is.
        ranks = torch.nn.functional.pad(self._ranks, (0, context.max_loras + 1))
        slots = slots.masked_fill(ranks[slots] == 0, -1)
        return make_plan(slots, topk_ids, context.local_num_experts)

    def rank_of(self, slot: int) -> int:
        """Return the rank of the adapter in ``slot``; 0 if these experts have no LoRA there."""
        return int(self._ranks[slot])

    def apply_base(self, output: torch.Tensor, *args: Any) -> None:
        """Run upstream's `apply` for tokens without an adapter, with its arguments."""
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
        """Compute the layer's output for the tokens with an adapter.

        Args:
            plan: the pairs of those tokens.
            hidden_states: [tokens, hidden] of the whole batch.
            w1, w2: the experts' weights, in the format of the upstream class.
            topk_weights, topk_ids: [tokens, top_k] of the whole batch.
            activation: upstream's `MoEActivation`.
            router_weight_on_input: the router weights are in ``hidden_states`` already, so the
                outputs are summed without them.

        Returns:
            [rows, hidden], one row for each token of ``plan.rows``, in float32 or in the dtype of
            ``hidden_states``.
        """
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
        """Compute the experts' output of a batch; see upstream's `FusedMoEExpertsModular.apply`.

        While it is traced, an operator is called that calls `compute`.
        """
        # Experts of a drafter have no LoRA context: what they do is upstream's and can be traced.
        if torch.compiler.is_compiling() and self._lora_context is not None:
            from .operators import OPERATORS

            # w1 and w2 must not be traced: slot_written gives them other shapes.
            name = self.operator_name
            OPERATORS.routed_experts(output, hidden_states, topk_weights, topk_ids, name)
            return
        self.compute(
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
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

    def compute(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *rest: Any,
    ) -> None:
        """Do what `apply` does. ``rest`` are its further arguments, in its order."""
        activation, apply_router_weight_on_input = rest[0], rest[-1]
        plan = self.plan_batch(hidden_states.shape[0], topk_ids)
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
