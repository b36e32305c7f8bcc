"""LoRA on unquantised experts on the CPU, in vLLM 0.11 and 0.24 to 0.27, with torch's operators.

In these releases the CPU experts are monolithic: one callable, the ``cpu_fused_moe`` of the layer
or of its quantisation method, does the routing and the experts. vLLM's LoRA layer cannot wrap it,
because it expects experts with a Triton kernel.

Here that callable is replaced by `CPUFusedMoEWithLoRA`. It runs the original for tokens without an
adapter. Tokens with one are computed expert by expert. For that the weights must not be packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...kernels.native import build


class CPUFusedMoEWithLoRA:
    """Replaces the ``cpu_fused_moe`` callable of a layer, and adds LoRA.

    Args:
        base: the original callable.
        wrapper: the LoRA layer (`FusedMoEWithLoRA`). Its stacks are read: lora_a [slots, experts,
            rank, in] and lora_b [slots, experts, out, rank], of gate, up and down, or of the fused
            gate_up and down. They are dense in 0.11, and a `SlotStack` each from 0.24 on.
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
        """Compute the layer's output, [tokens, hidden]. The arguments are those of the original.

        Args:
            x: [tokens, hidden].
            router_logits: [tokens, experts].

        Raises:
            NotImplementedError: a token has an adapter, and the model puts the router weights on
                the input, or has an activation that this vLLM does not have on the CPU.
        """
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
        """Return [tokens] int64, the adapter slot of each token; -1 without LoRA on this layer."""
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
        """Route the tokens with an adapter; returns topk_weights and topk_ids, [tokens, top_k].

        The parameters are those that ``cpu_fused_moe`` gets after the layer.
        """
        from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts

        if apply_router_weight_on_input:
            raise NotImplementedError(
                "MoE LoRA on the CPU does not support models that apply router weights on the "
                "experts' input in this vLLM release: use vLLM 0.30 or later."
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
        """Compute the sum over each token's experts of (W2 + B2 A2) act((W13 + B13 A13) x).

        Args:
            layer: has the weights, ``w13_weight`` and ``w2_weight`` [experts, out, in].
            x: [tokens, hidden].
            weights, ids: topk_weights and topk_ids, [tokens, top_k].
            slots: [tokens], all 0 or more.
            act: [tokens, gate and up] -> [tokens, intermediate].

        Returns:
            [tokens, hidden] float32.
        """
        out = torch.zeros(x.shape, dtype=torch.float32)
        pairs = torch.stack([slots.repeat_interleave(ids.shape[1]), ids.flatten().long()])
        for slot, expert in torch.unique(pairs, dim=1).T.tolist():
            rows, choice = ((ids == expert) & (slots == slot)[:, None]).nonzero(as_tuple=True)
            mine = x[rows]
            gate_up = _linear(layer, "w13", expert, mine)
            for start, delta in self._deltas(mine, slot, expert, gate_up.shape[1]):
                gate_up[:, start : start + delta.shape[1]] += delta
            hidden = act(gate_up)
            y = _linear(layer, "w2", expert, hidden)
            y = y + _product(hidden, *_factors(self._wrapper, "w2", 0, slot, expert))
            out.index_add_(0, rows, y.float() * weights[rows, choice].float()[:, None])
        return out

    def _deltas(
        self, x: torch.Tensor, slot: int, expert: int, width: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Compute B13 A13 x of each slice.

        Args:
            x: [tokens, hidden].
            width: columns of gate and up together in the base layer's output; each of the two may
                be padded.

        Yields:
            The first column of the slice in that output, and the product [tokens, out].
        """
        slices = getattr(self._wrapper, "_w13_slices", 2)
        for i in range(slices):
            factors = _factors(self._wrapper, "w13", i, slot, expert)
            yield i * (width // slices), _product(x, *factors)


def _activation(which: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the activation: [tokens, gate and up] -> [tokens, intermediate].

    Args:
        which: its name, or upstream's `MoEActivation`.

    Raises:
        NotImplementedError: this vLLM has no such activation on the CPU.
    """
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    table = getattr(cpu_fused_moe, "_CPU_MOE_ACT_FN", {"silu": _silu_and_mul})
    if which not in table:
        raise NotImplementedError(
            f"MoE LoRA on the CPU does not support the activation {which} in this vLLM release. "
            "Serve the model without --enable-lora."
        )
    act: Callable[[torch.Tensor], torch.Tensor] = table[which]
    return act


def replace_silu() -> None:
    """Let vLLM 0.24 compute SiLU as later releases do.

    It makes a custom operator in each forward, for which vLLM's config is needed and not set.
    """
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    cpu_fused_moe._CPU_MOE_ACT_FN[cpu_fused_moe.MoEActivation.SILU] = SiluAndMul.forward_native


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _linear(layer: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Apply one expert's base weight and bias; ``name`` is "w13" or "w2"."""
    bias = getattr(layer, f"{name}_bias", None)
    weight = getattr(layer, f"{name}_weight")[expert]
    return torch.nn.functional.linear(x, weight, None if bias is None else bias[expert])


def _factors(
    wrapper: Any, name: str, i: int, slot: int, expert: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lora_a [rank, in] and lora_b [out, rank] of one slot and expert.

    Args:
        wrapper: the `FusedMoEWithLoRA`.
        name: "w13" or "w2".
        i: the slice: 0 for gate, for a fused gate_up and for w2, 1 for up.
        slot, expert: which adapter and which local expert.
    """
    if hasattr(wrapper, "w1_lora_a_stacked"):  # 0.11: a buffer for each of w1, w3 and w2
        own = {"w2": ("w2",), "w13": ("w1", "w3")}[name][i]
        stacks = [getattr(wrapper, f"{own}_lora_{side}_stacked") for side in "ab"]
    else:
        stacks = [getattr(wrapper, f"{name}_lora_{side}_stacked")[i] for side in "ab"]
    # With --enable-moe-shared-loras a buffer has one entry for all experts.
    a, b = (stack[slot, expert % stack.shape[1]] for stack in stacks)
    return a, b


def _product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute b (a x). ``x`` may have more columns than ``a``, from padding; they are not used."""
    return x[:, : a.shape[1]] @ a.to(x.dtype).T @ b.to(x.dtype).T


def refuse_expert_parallel(config: Any) -> None:
    """Refuse expert parallelism, for which the CPU experts of these releases give wrong results.

    They take the router's global expert ids for local ones, and so read and write beyond the end of
    the local experts. That happens without LoRA, too.

    Args:
        config: the layer's `FusedMoEConfig`.

    Raises:
        NotImplementedError: the layer uses expert parallelism.
    """
    if config.moe_parallel_config.use_ep:
        raise NotImplementedError(
            "The CPU experts of this vLLM release do not support expert parallelism: they take "
            "global expert ids for local ones, with and without LoRA. Use vLLM 0.30 or later, or "
            "start without --enable-expert-parallel; vLLM then splits each expert among the ranks."
        )


def is_monolithic(runner: Any) -> bool:
    """Return whether a `MoERunner` runs the unquantised CPU experts of vLLM 0.24 to 0.27."""
    method = getattr(getattr(runner, "routed_experts", None), "quant_method", None)
    return hasattr(method, "cpu_fused_moe")


def init_wrapper(wrapper: Any, runner: Any) -> None:
    """Replaces `FusedMoEWithLoRA.__init__` in vLLM 0.24 to 0.27, for monolithic CPU experts.

    Upstream's constructor needs a modular kernel, which these experts do not have. This one sets
    the same attributes, except those of the kernel, and calls `install`.

    Args:
        wrapper: the `FusedMoEWithLoRA` to initialise.
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
    """Replace the layer's ``cpu_fused_moe`` by one with LoRA.

    Args:
        wrapper: the `FusedMoEWithLoRA`.
        layer: the module that has the weights.
        holder: the object that has ``cpu_fused_moe``: the layer (0.11) or its quantisation method.

    Raises:
        NotImplementedError: there is no ``cpu_fused_moe``, because the weights are quantised; or
            the weights are packed.
    """
    base = getattr(holder, "cpu_fused_moe", None)
    if base is None:
        raise NotImplementedError(
            f"{type(layer.quant_method).__name__}: MoE LoRA on the CPU supports only unquantised "
            "experts in this vLLM release. Serve an unquantised checkpoint, or use a newer vLLM."
        )
    if type(base).__name__ == "SGLFusedMOE" or layer.w13_weight.dim() != 3:
        raise NotImplementedError(
            "MoE LoRA on the CPU does not support packed weights in this vLLM release: set "
            "VLLM_CPU_SGL_KERNEL=0 and VLLM_CPU_MOE_PREPACK=0."
        )
    build.kernels()  # for the dense layers; they may have to be compiled, better now than later
    holder.cpu_fused_moe = CPUFusedMoEWithLoRA(base, wrapper)
