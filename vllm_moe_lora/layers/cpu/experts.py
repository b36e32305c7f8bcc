"""The common part of the CPU experts classes with LoRA support (vLLM 0.30 to 0.33).

vLLM's LoRA layer (`FusedMoEWithLoRA`) has the factors of all adapter slots, here in a `SlotStack`
each, and gives them to its experts as a `MoELoRAContext`. hooks/lora_layers_fused_moe_slots.py
makes them, and calls `slot_written` and `slot_cleared` after each change of a slot.

`apply` splits a batch. Tokens without an adapter run upstream's own `apply`, so their results are
bit for bit those without LoRA. Tokens with an adapter run `apply_lora` of the subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.cpu import PairPlan, make_plan
from ...kernels.native import build
from ...kernels.native.pairs import Pairs, make_pairs
from . import expert_parallel

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext


def token_slots(context: MoELoRAContext, num_tokens: int) -> torch.Tensor:
    """Return [num_tokens] int64, the adapter slot of each token.

    It is -1 for a token without an adapter, and for a padding token. With data parallelism, tokens
    of other ranks are among them; upstream sends their slots with them.
    """
    if context.local_token_lora_mapping is not None:
        return context.local_token_lora_mapping.long()
    slots: torch.Tensor = context.punica_wrapper.token_lora_indices
    have = slots.numel()
    if have == num_tokens:
        return slots
    if have > num_tokens:
        return slots[:num_tokens]
    return torch.nn.functional.pad(slots, (0, num_tokens - have), value=-1)


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
    return torch.bmm(weights.unsqueeze(1), y.to(torch.float32)).squeeze(1)


class SlotsToSend:
    """The slots of a batch's tokens, for upstream's dispatch to other data-parallel ranks.

    Upstream takes them from an attribute of this name, which its wrapper has on GPUs only.

    Attributes:
        token_lora_mapping: [tokens] int32, the adapter slot of each token; -1 without one, and
            beyond the end of the batch.
    """

    def __init__(self, tokens: int) -> None:
        self.token_lora_mapping = torch.full((tokens,), -1, dtype=torch.int32)

    def update(self, slots: torch.Tensor) -> None:
        """Take over the slots of a new batch, [tokens] int."""
        self.token_lora_mapping[: slots.numel()] = slots
        self.token_lora_mapping[slots.numel() :] = -1


class CPULoRAExperts:
    """Mixin that adds LoRA to an upstream CPU experts class. Subclasses implement `apply_lora`."""

    moe_config: Any  # the layer's FusedMoEConfig, set by upstream
    _lora_context: MoELoRAContext | None = None
    operator_name: str = ""  # of these experts in compiled code; layers/cpu/compiled.py sets it
    # [slots] int64, the rank of the adapter in each slot; 0 if these experts have no LoRA there.
    _ranks: torch.Tensor = torch.zeros(0, dtype=torch.int64)
    highest_rank: int = 0  # of all slots

    @staticmethod
    def supports_lora() -> bool:
        return True

    def set_lora_context(self, context: MoELoRAContext) -> None:
        build.kernels()  # they may have to be compiled: now, and not in the first request
        self._lora_context = context
        if self.moe_config.moe_parallel_config.dp_size > 1:
            wrapper: Any = context.punica_wrapper
            wrapper.token_mapping_meta = SlotsToSend(wrapper._token_lora_indices.numel())

    def slot_written(self, wrapper: Any, slot: int, rank: int) -> None:
        """Take over an adapter that the LoRA layer has just written into its stacks.

        Args:
            wrapper: the `FusedMoEWithLoRA`.
            slot: of the adapter, from 0.
            rank: the highest rank of its factors on this layer.
        """
        for name in ("w13_lora_a", "w13_lora_b", "w2_lora_a", "w2_lora_b"):
            for stack in getattr(wrapper, f"{name}_stacked"):
                stack.set_rank(slot, rank)
        self._set_rank(slot, rank)

    def slot_cleared(self, slot: int) -> None:
        """Forget ``slot``: it is empty, or its adapter has no LoRA on this layer's experts."""
        self._set_rank(slot, 0)

    def _set_rank(self, slot: int, rank: int) -> None:
        ranks = self._ranks
        if slot >= ranks.numel():
            ranks = torch.nn.functional.pad(ranks, (0, slot + 1 - ranks.numel()))
        self._ranks = ranks.index_fill(0, torch.tensor([slot]), rank)
        self.highest_rank = int(self._ranks.max())

    def take_slots(self, other: CPULoRAExperts) -> None:
        """Take over from ``other``, in whose place these experts are, what its slots hold."""
        self._ranks, self.highest_rank = other._ranks, other.highest_rank

    def batch_slots(self, num_tokens: int) -> torch.Tensor | None:
        """Return the adapter slot of each token; None if the batch has no LoRA on these experts.

        Args:
            num_tokens: tokens of the batch, padding included.
        """
        context = self._lora_context
        if context is None:
            return None
        # hooks/lora_punica_cpu.py sets token_segments for each batch. [] means: no adapters.
        own = getattr(context.punica_wrapper, "token_segments", None)
        if own == [] and context.local_token_lora_mapping is None:
            return None
        return token_slots(context, num_tokens) if self.highest_rank else None

    def native_pairs(self, slots: torch.Tensor, topk_ids: torch.Tensor) -> Pairs | None:
        """Collect the token-expert pairs with LoRA for the native kernels; see `make_pairs`."""
        context = self._lora_context
        assert context is not None
        return make_pairs(slots, self._ranks, topk_ids, context.local_num_experts)

    def plan_batch(self, slots: torch.Tensor, topk_ids: torch.Tensor) -> PairPlan | None:
        """Collect the token-expert pairs with LoRA; None if the batch has none.

        Args:
            slots: from `batch_slots`.
            topk_ids: [tokens, top_k] int, local expert ids; -1 for experts of other ranks.
        """
        context = self._lora_context
        assert context is not None
        # A token whose adapter has no LoRA on these experts counts as one without an adapter. A
        # token with slot -1 reads the last entry of ranks, and keeps -1 whatever that is.
        ranks = torch.nn.functional.pad(self._ranks, (0, context.max_loras + 1))
        slots = slots.masked_fill(ranks[slots] == 0, -1)
        return make_plan(slots, topk_ids, context.local_num_experts)

    def suspend(self) -> None:
        """Prepare for new base weights: bring the weights into the form that upstream gave them.

        The slots' factors stay in the LoRA layer. The experts take them over again before they
        compute, or earlier, when `slot_written` is called.
        """

    def current(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights to compute with: the arguments, unless weights were loaded since."""
        return w1, w2

    def rank_of(self, slot: int) -> int:
        """Return the rank of the adapter in ``slot``; 0 if these experts have no LoRA there."""
        return int(self._ranks[slot])

    def apply_base(self, output: torch.Tensor, *args: Any) -> None:
        """Run upstream's `apply` for tokens without an adapter, with its arguments.

        All expert ids are local ones: upstream's operators would take those of other ranks for
        local ones, too, and write beyond the end of the experts.
        """
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
        """Do what `apply_lora` does with the native kernels, and write the result to ``output``.

        Only the rows of tokens with an adapter are written.

        Returns:
            Whether it was possible. If not, `apply_lora` has to run.
        """
        return False

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

        While it is traced, an operator is called that calls `compute`. With expert parallelism the
        output is the part that this rank's experts contribute.
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
        activation, expert_map, apply_router_weight_on_input = rest[0], rest[2], rest[-1]
        w1, w2 = self.current(w1, w2)
        base = self.apply_base
        if expert_map is not None:
            topk_ids = expert_parallel.local_ids(topk_ids, expert_map)
            base = self._apply_local_base
        given = hidden_states, w1, w2, topk_weights, topk_ids
        slots = self.batch_slots(hidden_states.shape[0])
        if slots is None:
            base(output, *given, *rest)
            return
        # The native kernels take all pairs for this rank's.
        pairs = self.native_pairs(slots, topk_ids) if expert_map is None else None
        if pairs is not None:
            if not len(pairs):
                base(output, *given, *rest)
                return
            lora = *given, activation, apply_router_weight_on_input
            if self.apply_native(pairs, output, *lora):
                if not pairs.all_tokens:
                    self._apply_base_rows(base, pairs.rows, output, *given, *rest)
                return
        plan = self.plan_batch(slots, topk_ids)
        if plan is None:
            base(output, *given, *rest)
            return
        if len(plan):
            with_lora = self.apply_lora(plan, *given, activation, apply_router_weight_on_input)
        else:  # the experts of these tokens are on other ranks
            with_lora = output.new_zeros(plan.rows.numel(), output.shape[1])
        if plan.rows.numel() == hidden_states.shape[0]:
            output.copy_(with_lora)
            return
        self._apply_base_rows(base, plan.rows, output, *given, *rest)
        output[plan.rows] = with_lora.to(output.dtype)

    def _apply_base_rows(
        self,
        apply_base: Callable[..., None],
        rows_with_lora: torch.Tensor,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *rest: Any,
    ) -> None:
        """Run ``apply_base`` for all rows but ``rows_with_lora``, and write only to those."""
        if rows_with_lora.numel() == hidden_states.shape[0]:
            return
        base = torch.ones(hidden_states.shape[0], dtype=torch.bool)
        base[rows_with_lora] = False
        rows = base.nonzero().flatten()
        part = output.new_empty(rows.numel(), output.shape[1])
        apply_base(part, hidden_states[rows], w1, w2, topk_weights[rows], topk_ids[rows], *rest)
        output[rows] = part

    def _apply_local_base(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *rest: Any,
    ) -> None:
        """Run `apply_base` for the pairs of this rank; ``topk_ids`` is -1 for the others."""
        rows, weights, ids = expert_parallel.local_choices(topk_weights, topk_ids)
        output.zero_()
        if rows.numel():
            part = output.new_empty(rows.numel(), output.shape[1])
            self.apply_base(part, hidden_states[rows], w1, w2, weights, ids, *rest)
            output[rows] = part
