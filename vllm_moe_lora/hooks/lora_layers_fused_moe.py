"""vllm/lora/layers/fused_moe.py: the LoRA layers of routed experts.

`FusedMoEWithLoRA` has separate factors for gate and up, `FusedMoE3DWithLoRA` has them fused. What
they do changed much between releases:

- 0.11 to 0.19: the constructor calls `_inject_lora_into_fused_moe`, which wraps functions around
  the methods of the experts' kernel;
- 0.20 and later: they give the experts a `MoELoRAContext`, and the experts add the LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.lora.layers.fused_moe"


def _init_0_11(original: Callable[..., Any]) -> Callable[..., Any]:
    """In 0.11: give INT4 weights the names that the constructor reads."""

    def __init__(self: Any, base_layer: Any) -> None:
        from ..layers.quantised.weight_names import alias_weights

        alias_weights(base_layer)
        original(self, base_layer)

    return __init__


def _init_0_12_to_0_27(original: Callable[..., Any]) -> Callable[..., Any]:
    """In 0.12 to 0.27: make INT4 layers and CPU experts work, and explain errors."""

    def __init__(self: Any, base_layer: Any) -> None:
        from ..layers.cpu import torch_experts
        from ..layers.quantised import select_experts

        if torch_experts.is_monolithic(base_layer):
            return torch_experts.init_wrapper(self, base_layer)
        with select_experts.explained(base_layer):
            select_experts.prepare(base_layer)
            original(self, base_layer)
        return None

    return __init__


def _init_explaining(original: Callable[..., Any]) -> Callable[..., Any]:
    """From 0.28 on: only explain errors."""

    def __init__(self: Any, base_layer: Any) -> None:
        from ..layers.quantised import select_experts

        with select_experts.explained(base_layer):
            original(self, base_layer)

    return __init__


def _set_mapping(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        if hasattr(self, "_moe_kernel"):
            return original(self, punica_wrapper)
        # A layer from torch_experts.init_wrapper has no kernel to set up.
        self.punica_wrapper = punica_wrapper
        return None

    return set_mapping


class _Classes(tuple[type, ...]):
    """Classes for `isinstance`. Unlike a tuple, an instance can have the attribute `MARK`."""


def _with_marlin(original: Any) -> Any:
    from vllm.lora.layers.fused_moe import MarlinExperts

    return _Classes((original, MarlinExperts))


def _inject_0_11(original: Callable[..., Any]) -> Callable[..., Any]:
    """In 0.11: also choose the experts class, and add LoRA on the CPU."""

    def _inject_lora_into_fused_moe(self: Any) -> None:
        from ..layers.cpu import torch_experts
        from ..layers.gpu import router_weights_on_input
        from ..layers.quantised import vllm_0_11

        if vllm_0_11.on_cpu(self):
            return torch_experts.install(self, self.base_layer, self.base_layer)
        with vllm_0_11.experts_for(self.base_layer):
            original(self)
        vllm_0_11.disable_chunking(self.base_layer)
        router_weights_on_input.install(self.base_layer)
        return None

    return _inject_lora_into_fused_moe


def _modular_triton(original: Callable[..., Any]) -> Callable[..., Any]:
    def modular_triton_fused_moe(quant_config: Any, shared_experts: Any = None) -> Any:
        from ..layers.quantised import vllm_0_11

        return vllm_0_11.make_kernel(shared_experts) or original(quant_config, shared_experts)

    return modular_triton_fused_moe


def _inject_0_14_to_0_19(original: Callable[..., Any]) -> Callable[..., Any]:
    """In 0.14 to 0.19: correct the router weights on the input."""

    def _inject_lora_into_fused_moe(self: Any) -> None:
        from ..layers.gpu import router_weights_on_input

        original(self)
        router_weights_on_input.install(self.base_layer)

    return _inject_lora_into_fused_moe


def _inject_0_12_and_0_13(original: Callable[..., Any]) -> Callable[..., Any]:
    """In 0.12 and 0.13: correct the router weights on the input, and the order of rows."""

    def _inject_lora_into_fused_moe(self: Any) -> None:
        from ..layers.gpu import router_weights_on_input, triton_kernels_experts

        original(self)
        router_weights_on_input.install(self.base_layer)
        triton_kernels_experts.install(self.base_layer)

    return _inject_lora_into_fused_moe


def _ep_check(original: Callable[..., Any]) -> Callable[..., Any]:
    def _ep_check(self: Any) -> None:
        from ..targets import supports_lora

        supports_lora.check_layer(self)
        original(self)

    return _ep_check


def _create_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """Up to 0.20: refuse what `_ep_check` refuses later."""

    def create_lora_weights(self: Any, max_loras: int, *args: Any, **more: Any) -> None:
        from ..targets import supports_lora

        supports_lora.check_layer(self)
        original(self, max_loras, *args, **more)

    return create_lora_weights


def _create_0_21(original: Callable[..., Any]) -> Callable[..., Any]:
    """In 0.21: correct n_slices, by which the warm-up adapter is made."""

    def create_lora_weights(self: Any, max_loras: int, *args: Any, **more: Any) -> None:
        original(self, max_loras, *args, **more)
        self.n_slices = len(self.lora_a_stacked) // max_loras

    return create_lora_weights


def _intermediate_size(original: property) -> property:
    def intermediate_size_per_partition(self: Any) -> int:
        from ..layers.gpu import padding

        return padding.padded_size(self, original.__get__(self))

    return property(intermediate_size_per_partition)


def _slice_w13_b(original: Callable[..., Any]) -> Callable[..., Any]:
    def _slice_w13_b(self: Any, w13_lora_b: Any) -> Any:
        from ..layers.gpu import padding

        return padding.rank_slice(self, w13_lora_b, 1)

    return _slice_w13_b


def _slice_w13_b_fused(original: Callable[..., Any]) -> Callable[..., Any]:
    def _slice_w13_b(self: Any, w13_lora_b: Any) -> Any:
        from ..layers.gpu import padding

        # Like upstream: only gpt-oss interleaves gate and up.
        interleaved = self._base_model == "GptOssForCausalLM"
        return padding.rank_slice_fused(self, w13_lora_b, interleaved)

    return _slice_w13_b


def _slice_w2_a(original: Callable[..., Any]) -> Callable[..., Any]:
    def _slice_w2_a(self: Any, w2_lora_a: Any) -> Any:
        from ..layers.gpu import padding

        return padding.rank_slice(self, w2_lora_a, 2)

    return _slice_w2_a


_V0_11: dict[str, Any] = {
    "feature": "quantised-experts",
    "releases": ">=0.11.1,<0.12",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.12.0/vllm/lora/layers/fused_moe.py",
    "until": "0.12, which asks the quantisation method for its experts",
    "layers": True,
}

_CPU: dict[str, Any] = {
    "feature": "cpu-experts",
    "releases": ">=0.24,<0.28",
    "platforms": ("cpu",),
    "why": "it needs a modular kernel, but the CPU experts of these releases are monolithic: one "
    "function does the routing and the experts",
    "upstream": "",
    "until": "upstream's CPU experts support LoRA",
    "layers": True,
}
_QUANTISED: dict[str, Any] = {
    "feature": "quantised-experts",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.27.1/vllm/model_executor/layers/"
    "quantization/moe_wna16.py",
    "layers": True,
}

_ROUTER_WEIGHTS: dict[str, Any] = {
    "feature": "gpu-experts",
    "target": f"{_FILE}:FusedMoEWithLoRA._inject_lora_into_fused_moe",
    "why": "if the router weights are applied on the experts' input (Llama-4), the LoRA of gate "
    "and up is computed without them, and the LoRA of down is multiplied with them twice",
    "upstream": "",
    "until": "0.20, where hooks/fused_moe_modular_method.py corrects it",
    "layers": True,
}

_PARALLEL: dict[str, Any] = {"feature": "parallel-experts", "layers": True}
_CHECKED: dict[str, Any] = {
    **_PARALLEL,
    "make": _create_checked,
    "why": "with --data-parallel-size above 1 the experts are split over the ranks of all engines, "
    "but the LoRA layer assumes the ranks of one engine: up to 0.19 all answers are wrong, even "
    "without adapters, and up to 0.20 the factors of an adapter do not fit the experts of a rank",
    "upstream": "",
    "until": "0.21, where the hook of _ep_check refuses it",
}
_PADDED: dict[str, Any] = {
    **_PARALLEL,
    "why": "if the weight format pads the intermediate size of the experts, a rank of tensor "
    "parallelism takes the wrong part of an adapter",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/lora/layers/fused_moe.py",
}
_PADDED_2D: dict[str, Any] = {
    **_PADDED,
    "releases": ">=0.12,<0.33",
    "until": "0.33, which slices an adapter by the size without padding",
}

HOOKS = (
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA._ep_check",
        make=_ep_check,
        releases=">=0.21,<0.34",
        why="two things give silently wrong answers: EPLB moves experts to other devices but not "
        "their LoRA factors (up to 0.29); and with data parallelism, tokens arrive with slot "
        "numbers of another engine, which may have another adapter in that slot",
        upstream="",
        until="upstream moves the factors with the experts, and uses the same slots in all "
        "engines; or refuses both",
        **_PARALLEL,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.create_lora_weights",
        releases=">=0.11.1,<0.21",
        **_CHECKED,
    ),
    Hook(
        target=f"{_FILE}:FusedMoE3DWithLoRA.create_lora_weights",
        releases=">=0.12,<0.21",
        **_CHECKED,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.create_lora_weights",
        make=_create_0_21,
        releases=">=0.21,<0.22",
        why="with expert parallelism the start fails with an IndexError, because the warm-up "
        "adapter is made for all experts instead of the local ones",
        upstream="https://github.com/vllm-project/vllm/blob/v0.22.0/vllm/lora/layers/fused_moe.py",
        until="0.22, which makes it for the local experts",
        **_PARALLEL,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.intermediate_size_per_partition",
        make=_intermediate_size,
        releases=">=0.25,<0.34",
        why="Marlin pads the intermediate size of experts, but the layer's config keeps the size "
        "without padding: the LoRA of up is added to the padding of gate, and lora_a of down is "
        "read beyond its end",
        upstream="https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/model_executor/layers/"
        "fused_moe/oracle/int_wna16.py",
        until="moe_config.intermediate_size_per_partition includes Marlin's padding",
        **_PARALLEL,
    ),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA._slice_w13_b", make=_slice_w13_b, **_PADDED_2D),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA._slice_w2_a", make=_slice_w2_a, **_PADDED_2D),
    Hook(
        target=f"{_FILE}:FusedMoE3DWithLoRA._slice_w13_b",
        make=_slice_w13_b_fused,
        releases=">=0.12,<0.34",
        **{
            **_PADDED,
            "why": f"{_PADDED['why']} (up to 0.32); and without tensor parallelism the rows of up "
            "in a fused lora_b are written where the padding of gate is",
            "until": "upstream pads a fused lora_b without tensor parallelism, too",
        },
    ),
    Hook(make=_inject_0_14_to_0_19, **_ROUTER_WEIGHTS, releases=">=0.14,<0.20"),
    Hook(
        make=_inject_0_12_and_0_13,
        **{
            **_ROUTER_WEIGHTS,
            "why": f"{_ROUTER_WEIGHTS['why']}; and the rows of gpt-oss' MXFP4 experts in Triton "
            "are sorted by expert, but LoRA is added as if they were in token order, so a token "
            "gets the LoRA of another one (https://github.com/vllm-project/vllm/pull/30585)",
        },
        releases=">=0.12,<0.14",
    ),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.set_mapping", make=_set_mapping, **_CPU),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.__init__",
        make=_init_0_11,
        why="INT4 layers call their weights w13_qweight or w13_weight_packed, so the start fails: "
        "'SharedFusedMoE' object has no attribute 'w2_weight'",
        **_V0_11,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA._inject_lora_into_fused_moe",
        make=_inject_0_11,
        why="three defects: GPTQ and AWQ layers that run Marlin have no quantisation config for "
        "LoRA; there is no Triton on a CPU; and in batches of more than VLLM_FUSED_MOE_CHUNK_SIZE "
        "tokens, tokens get the LoRA of other ones",
        **_V0_11,
    ),
    Hook(
        target=f"{_FILE}:modular_triton_fused_moe",
        make=_modular_triton,
        why="it runs Triton experts on weights that are packed for Marlin",
        **_V0_11,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.__init__",
        make=_init_0_12_to_0_27,
        releases=">=0.12,<0.28",
        why="INT4 layers call their weights w13_qweight or w13_weight_packed, so the start fails: "
        "'RoutedExperts' object has no attribute 'w13_weight'; and if no experts class supports "
        "LoRA, it fails with an AssertionError that has no text",
        until="0.28, where each quantisation method makes its experts and names its weights",
        **_QUANTISED,
    ),
    Hook(
        feature="untargeted-experts",
        target=f"{_FILE}:FusedMoEWithLoRA.__init__",
        make=_init_explaining,
        releases=">=0.28,<0.34",
        why="if a layer's experts do not support LoRA, the start fails with an AssertionError or "
        "RuntimeError that names neither the layer nor what to do",
        upstream="",
        until="upstream says which flag helps",
        layers=True,
    ),
    Hook(
        target=f"{_FILE}:TritonExperts",
        make=_with_marlin,
        releases=">=0.16,<0.20",
        why="the LoRA layer asserts that its experts are TritonExperts, although it also works "
        "with MarlinExperts; in this file the name is used in that assertion only",
        until="0.20, which asks the experts class whether it supports LoRA",
        hashed=False,
        **_QUANTISED,
    ),
)
