"""vllm/lora/layers/fused_moe.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.lora.layers.fused_moe"


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, base_layer: Any) -> None:
        from ..layers.quantised.weight_names import alias_weights

        alias_weights(base_layer)
        original(self, base_layer)

    return __init__


def _init_asking(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, base_layer: Any) -> None:
        from ..layers.cpu import torch_experts
        from ..layers.quantised import select_experts

        if torch_experts.routes_alone(base_layer):
            return torch_experts.prepare(self, base_layer)
        with select_experts.explained(base_layer):
            select_experts.prepare(base_layer)
            original(self, base_layer)
        return None

    return __init__


def _init_explained(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, base_layer: Any) -> None:
        from ..layers.quantised import select_experts

        with select_experts.explained(base_layer):
            original(self, base_layer)

    return __init__


def _set_mapping(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        if hasattr(self, "_moe_kernel"):
            return original(self, punica_wrapper)
        self.punica_wrapper = punica_wrapper  # the rest is for a kernel
        return None

    return set_mapping


class _Classes(tuple[type, ...]):
    """Classes for `isinstance`; unlike a plain tuple it can carry the mark of a replacement."""


def _with_marlin(original: Any) -> Any:
    from vllm.lora.layers.fused_moe import MarlinExperts

    return _Classes((original, MarlinExperts))


def _inject(original: Callable[..., Any]) -> Callable[..., Any]:
    def _inject_lora_into_fused_moe(self: Any) -> None:
        from ..layers.cpu import torch_experts
        from ..layers.gpu import router_weights_on_input
        from ..layers.quantised import vllm_0_11

        if vllm_0_11.on_cpu(self):
            return torch_experts.install(self, self.base_layer, self.base_layer)
        with vllm_0_11.chosen(self.base_layer):
            original(self)
        vllm_0_11.in_one_piece(self.base_layer)
        router_weights_on_input.install(self.base_layer)
        return None

    return _inject_lora_into_fused_moe


def _modular_triton(original: Callable[..., Any]) -> Callable[..., Any]:
    def modular_triton_fused_moe(quant_config: Any, shared_experts: Any = None) -> Any:
        from ..layers.quantised import vllm_0_11

        return vllm_0_11.kernel(shared_experts) or original(quant_config, shared_experts)

    return modular_triton_fused_moe


def _inject_weighted(original: Callable[..., Any]) -> Callable[..., Any]:
    def _inject_lora_into_fused_moe(self: Any) -> None:
        from ..layers.gpu import router_weights_on_input

        original(self)
        router_weights_on_input.install(self.base_layer)

    return _inject_lora_into_fused_moe


def _inject_in_order(original: Callable[..., Any]) -> Callable[..., Any]:
    def _inject_lora_into_fused_moe(self: Any) -> None:
        from ..layers.gpu import router_weights_on_input, triton_kernels_experts

        original(self)
        router_weights_on_input.install(self.base_layer)
        triton_kernels_experts.install(self.base_layer)

    return _inject_lora_into_fused_moe


def _ep_check(original: Callable[..., Any]) -> Callable[..., Any]:
    def _ep_check(self: Any) -> None:
        from ..targets import supports_lora

        supports_lora.refuse(self)
        original(self)

    return _ep_check


def _create_refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_lora_weights(self: Any, max_loras: int, *args: Any, **more: Any) -> None:
        from ..targets import supports_lora

        supports_lora.refuse(self)
        original(self, max_loras, *args, **more)

    return create_lora_weights


def _create(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_lora_weights(self: Any, max_loras: int, *args: Any, **more: Any) -> None:
        original(self, max_loras, *args, **more)
        self.n_slices = len(self.lora_a_stacked) // max_loras

    return create_lora_weights


def _inner(original: property) -> property:
    def intermediate_size_per_partition(self: Any) -> int:
        from ..layers.gpu import padding

        return padding.inner(self, original.__get__(self))

    return property(intermediate_size_per_partition)


def _slice_w13_b(original: Callable[..., Any]) -> Callable[..., Any]:
    def _slice_w13_b(self: Any, w13_lora_b: Any) -> Any:
        from ..layers.gpu import padding

        return padding.of_rank(self, w13_lora_b, 1)

    return _slice_w13_b


def _slice_w13_b_fused(original: Callable[..., Any]) -> Callable[..., Any]:
    def _slice_w13_b(self: Any, w13_lora_b: Any) -> Any:
        from ..layers.gpu import padding

        # Upstream knows the one model whose gate and up alternate by its name, too.
        interleaved = self._base_model == "GptOssForCausalLM"
        return padding.of_rank_fused(self, w13_lora_b, interleaved)

    return _slice_w13_b


def _slice_w2_a(original: Callable[..., Any]) -> Callable[..., Any]:
    def _slice_w2_a(self: Any, w2_lora_a: Any) -> Any:
        from ..layers.gpu import padding

        return padding.of_rank(self, w2_lora_a, 2)

    return _slice_w2_a


_V0_11: dict[str, Any] = {
    "feature": "quantised-experts",
    "releases": ">=0.11.1,<0.12",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.12.0/vllm/lora/layers/fused_moe.py",
    "until": "0.12, which asks the quantisation method for its experts",
    "layers": True,
}

_PLAIN: dict[str, Any] = {
    "feature": "cpu-experts",
    "releases": ">=0.24,<0.28",
    "platforms": ("cpu",),
    "why": "it wants a kernel; the CPU's experts of these releases have none and route alone",
    "upstream": "",
    "until": "upstream's CPU experts support LoRA",
    "layers": True,
}
_ASKING: dict[str, Any] = {
    "feature": "quantised-experts",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.27.1/vllm/model_executor/layers/"
    "quantization/moe_wna16.py",
    "layers": True,
}

_WEIGHTED: dict[str, Any] = {
    "feature": "gpu-experts",
    "target": f"{_FILE}:FusedMoEWithLoRA._inject_lora_into_fused_moe",
    "why": "where router weights go on the experts' input (Llama-4), gate's and up's factors get "
    "tokens without them, and down's change is multiplied by them once more",
    "upstream": "",
    "until": "0.20, where the kernel takes LoRA (hooks/fused_moe_modular_method.py)",
    "layers": True,
}

_PARALLEL: dict[str, Any] = {"feature": "parallel-experts", "layers": True}
_RANKS: dict[str, Any] = {
    **_PARALLEL,
    "make": _create_refusing,
    "why": "with --data-parallel-size experts are spread over ranks of which each takes its own "
    "tokens for all, with or without adapters (up to 0.19), or the factors do not fit",
    "upstream": "",
    "until": "0.21, see _ep_check",
}
_PADDED: dict[str, Any] = {
    **_PARALLEL,
    "releases": ">=0.12,<0.34",
    "why": "where a weight format pads the experts' inner dimension, a rank of tensor parallelism "
    "takes its part of an adapter from the wrong place, and up's rows lie where gate's padding is",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/lora/layers/fused_moe.py",
    "until": "upstream's slices are right with one rank and fused factors, too",
}

HOOKS = (
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA._ep_check",
        make=_ep_check,
        releases=">=0.21,<0.34",
        why="experts that EPLB moves leave their factors behind, and data parallel ranks take "
        "each other's slots for their own, both without a word",
        upstream="",
        until="EPLB moves LoRA's stacks with the experts and ranks agree on slots, or upstream "
        "refuses them",
        **_PARALLEL,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.create_lora_weights",
        releases=">=0.11.1,<0.21",
        **_RANKS,
    ),
    Hook(
        target=f"{_FILE}:FusedMoE3DWithLoRA.create_lora_weights",
        releases=">=0.12,<0.21",
        **_RANKS,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.create_lora_weights",
        make=_create,
        releases=">=0.21,<0.22",
        why="IndexError at start: with expert parallelism the warm-up adapter is made for all "
        "experts, not for this rank's",
        upstream="https://github.com/vllm-project/vllm/blob/v0.22.0/vllm/lora/layers/fused_moe.py",
        until="0.22, which counts a rank's experts",
        **_PARALLEL,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.intermediate_size_per_partition",
        make=_inner,
        releases=">=0.25,<0.34",
        why="Marlin pads experts to its tiles and tells nobody: up's delta is written into gate's "
        "padding, and down's lora_a is read past its rows",
        upstream="https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/model_executor/layers/"
        "fused_moe/oracle/int_wna16.py",
        until="Marlin's padding is in moe_config.intermediate_size_per_partition",
        **_PARALLEL,
    ),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA._slice_w13_b", make=_slice_w13_b, **_PADDED),
    Hook(target=f"{_FILE}:FusedMoE3DWithLoRA._slice_w13_b", make=_slice_w13_b_fused, **_PADDED),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA._slice_w2_a", make=_slice_w2_a, **_PADDED),
    Hook(make=_inject_weighted, **_WEIGHTED, releases=">=0.14,<0.20"),
    Hook(
        make=_inject_in_order,
        **{
            **_WEIGHTED,
            "why": f"{_WEIGHTED['why']}; and rows of gpt-oss' MXFP4 experts in "
            "Triton lie by expert and get the changes of other tokens "
            "(https://github.com/vllm-project/vllm/pull/30585)",
        },
        releases=">=0.12,<0.14",
    ),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.set_mapping", make=_set_mapping, **_PLAIN),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.__init__",
        make=_init,
        why="'SharedFusedMoE' object has no attribute 'w2_weight': layers of INT4 weights have "
        "other names for them",
        **_V0_11,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA._inject_lora_into_fused_moe",
        make=_inject,
        why="GPTQ-Marlin and AWQ-Marlin have no quantisation config here; on a CPU there is no "
        "Triton; batches above VLLM_FUSED_MOE_CHUNK_SIZE tokens get wrong factors",
        **_V0_11,
    ),
    Hook(
        target=f"{_FILE}:modular_triton_fused_moe",
        make=_modular_triton,
        why="Triton experts are run over weights that are packed for Marlin",
        **_V0_11,
    ),
    Hook(
        target=f"{_FILE}:FusedMoEWithLoRA.__init__",
        make=_init_asking,
        releases=">=0.12,<0.28",
        why="'RoutedExperts' object has no attribute 'w13_weight': INT4 layers have other names "
        "for their weights; and a layer without experts for LoRA ends in a bare AssertionError",
        until="0.28, whose methods all have experts of their own, and names for their weights",
        **_ASKING,
    ),
    Hook(
        feature="untargeted-experts",
        target=f"{_FILE}:FusedMoEWithLoRA.__init__",
        make=_init_explained,
        releases=">=0.28,<0.34",
        why="experts without LoRA end the start in an AssertionError or RuntimeError that names "
        "neither layer nor cure",
        upstream="",
        until="upstream says which flag helps",
        layers=True,
    ),
    Hook(
        target=f"{_FILE}:TritonExperts",
        make=_with_marlin,
        releases=">=0.16,<0.20",
        why="the wrapper asserts that its experts are Triton's; this name is used there only",
        until="0.20, where experts say themselves whether they take LoRA",
        hashed=False,
        **_ASKING,
    ),
)
