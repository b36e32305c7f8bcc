"""Experts of a CPU that route for themselves (0.11, 0.24 to 0.27), with LoRA by torch's operators.

Upstream's wrapper knows Triton kernels only. Here the layer's CPU operator is called for base
tokens, as it is without LoRA, and tokens with an adapter are computed expert by expert, over plain
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .experts import refuse_expert_parallel


class CPUFusedMoEWithLoRA:
    """Stands where the layer has its ``cpu_fused_moe``.

    Args:
        base: what stood there.
        wrapper: the `FusedMoEWithLoRA`, whose stacks are read: lora_a [slots, experts, rank, in]
            and lora_b [slots, experts, out, rank] of gate, up and down, or of gate_up and down.
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
        act = _activation(args[10] if len(args) > 10 else more.get("activation", "silu"))
        out[rows] = self._with_lora(layer, x[rows], weights, ids, slots[rows], act).to(out.dtype)
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
        activation: Any = "silu",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts

        if apply_router_weight_on_input:
            raise NotImplementedError(
                "on a CPU this vLLM has no LoRA for models with the router weight on the input: "
                "take 0.30 or a later one"
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
        act: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """[tokens, hidden] fp32, summed over experts: (W2 + B2 A2) act((W13 + B13 A13) x)."""
        out = torch.zeros(x.shape, dtype=torch.float32)
        pairs = torch.stack([slots.repeat_interleave(ids.shape[1]), ids.flatten().long()])
        for slot, expert in torch.unique(pairs, dim=1).T.tolist():
            rows, place = ((ids == expert) & (slots == slot)[:, None]).nonzero(as_tuple=True)
            mine = x[rows]
            both = _linear(layer, "w13", expert, mine)
            for start, delta in self._deltas(mine, slot, expert, both.shape[1]):
                both[:, start : start + delta.shape[1]] += delta
            hidden = act(both)
            y = _linear(layer, "w2", expert, hidden)
            y = y + _product(hidden, *_factors(self._wrapper, "w2", 0, slot, expert))
            out.index_add_(0, rows, y.float() * weights[rows, place].float()[:, None])
        return out

    def _deltas(
        self, x: torch.Tensor, slot: int, expert: int, width: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first column, values) of what is added to gate and up, whose columns may be padded."""
        slices = getattr(self._wrapper, "_w13_slices", 2)
        for i in range(slices):
            factors = _factors(self._wrapper, "w13", i, slot, expert)
            yield i * (width // slices), _product(x, *factors)


def _activation(which: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Raises NotImplementedError."""
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    table = getattr(cpu_fused_moe, "_CPU_MOE_ACT_FN", {"silu": _silu_and_mul})
    if which not in table:
        raise NotImplementedError(f"on a CPU this vLLM has no MoE activation {which}")
    act: Callable[[torch.Tensor], torch.Tensor] = table[which]
    return act


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _linear(layer: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    bias = getattr(layer, f"{name}_bias", None)
    weight = getattr(layer, f"{name}_weight")[expert]
    return torch.nn.functional.linear(x, weight, None if bias is None else bias[expert])


def _factors(
    wrapper: Any, name: str, i: int, slot: int, expert: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_a [rank, in] and lora_b [out, rank]: 0.11 has a stack for each of w1, w3 and w2."""
    if hasattr(wrapper, "w1_lora_a_stacked"):
        own = {"w2": ("w2",), "w13": ("w1", "w3")}[name][i]
        stacks = [getattr(wrapper, f"{own}_lora_{side}_stacked") for side in "ab"]
    else:
        stacks = [getattr(wrapper, f"{name}_lora_{side}_stacked")[i] for side in "ab"]
    # A stack that all experts share (--enable-moe-shared-loras) has one place.
    a, b = (stack[slot, expert % stack.shape[1]] for stack in stacks)
    return a, b


def _product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``x`` may be wider than ``a`` is, by padding."""
    return x[:, : a.shape[1]] @ a.to(x.dtype).T @ b.to(x.dtype).T


def routes_alone(runner: Any) -> bool:
    """Whether the experts are a CPU's of 0.24 to 0.27, unquantised."""
    method = getattr(getattr(runner, "routed_experts", None), "quant_method", None)
    return hasattr(method, "cpu_fused_moe")


def prepare(wrapper: Any, runner: Any) -> None:
    """`FusedMoEWithLoRA.__init__` of 0.24 to 0.27 without a kernel, which a CPU has not.

    Args:
        wrapper: is initialised.
        runner: the `MoERunner` that it wraps.

    Raises:
        NotImplementedError: see `install` and `refuse_expert_parallel`.
    """
    refuse_expert_parallel(runner.moe_config)
    torch.nn.Module.__init__(wrapper)
    config = runner.moe_config
    wrapper.base_layer = runner
    wrapper.moe_config = config
    wrapper._shared_experts = runner._shared_experts
    wrapper._ep_check()
    wrapper.tp_size = config.moe_parallel_config.tp_size
    wrapper.tp_rank = config.moe_parallel_config.tp_rank
    wrapper.device = runner.routed_experts.w2_weight.device
    wrapper._enable_aux_cuda_stream = False
    wrapper._init_lora_stream_context()
    wrapper._w13_slices = 2 if config.is_act_and_mul else 1
    wrapper.n_slices = wrapper.local_num_experts * (wrapper._w13_slices + 1)
    wrapper.enable_moe_shared_loras = False
    install(wrapper, runner.routed_experts, runner.routed_experts.quant_method)


def install(wrapper: Any, layer: Any, holder: Any) -> None:
    """Put LoRA into the layer's CPU operator.

    Args:
        wrapper: the `FusedMoEWithLoRA`.
        layer: has the weights.
        holder: has the operator, ``cpu_fused_moe``.

    Raises:
        NotImplementedError: there is none, or the weights are packed.
    """
    base = getattr(holder, "cpu_fused_moe", None)
    if base is None:
        raise NotImplementedError(
            f"{type(layer.quant_method).__name__}: on a CPU this vLLM has LoRA for unquantised "
            "experts only. Serve an unquantised checkpoint, or a newer vLLM."
        )
    if type(base).__name__ == "SGLFusedMOE" or layer.w13_weight.dim() != 3:
        raise NotImplementedError(
            "on a CPU this vLLM has MoE LoRA for plain weights only: set VLLM_CPU_SGL_KERNEL=0 and "
            "VLLM_CPU_MOE_PREPACK=0."
        )
    holder.cpu_fused_moe = CPUFusedMoEWithLoRA(base, wrapper)
