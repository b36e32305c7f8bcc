"""Which layers' routed experts an adapter may target, said before the layer chooses its backend.

A layer that no adapter may target is built as without LoRA: its backend is the one vLLM chooses
without LoRA, its module is not wrapped, no slots are allocated for it. An adapter that targets it
all the same is refused when it is loaded (`strict`, `fit`), never ignored.

Two things can say so: `lora_target_modules` (vLLM 0.19 and later), in vLLM's own meaning, by which
`LoRAModelManager` wraps modules; and, for a server to which no adapter can be added, the adapters
it was started with (`declared`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FLAG = "--lora-target-modules"
DECLARED = "--lora-modules"
# In `VllmConfig.additional_config`, which reaches every process of the engine.
KEY = "moe_lora_no_experts"


def may_target(config: Any, layer: str) -> bool:
    """Whether an adapter may have LoRA on the routed experts of ``layer``.

    Args:
        config: the `VllmConfig`; without LoRA the answer is no.
        layer: the layer's name, "model.layers.0.mlp.experts". Models need not give one, nor the
            one by which the model holds the module: where that is so the answer is yes.
    """
    if config.lora_config is None:
        return False
    targets = getattr(config.lora_config, "target_modules", None)
    if targets is not None:
        return not layer or any(_may_mean(target, layer) for target in targets)
    more = getattr(config, "additional_config", None)
    declared_none = isinstance(more, dict) and bool(more.get(KEY))
    # Adapters are known to leave out what their tensors call "experts", nothing else.
    return not (declared_none and layer.endswith(".experts"))


def _may_mean(target: str, layer: str) -> bool:
    """Whether vLLM may find that ``target`` names the module of ``layer``."""
    own = layer.rpartition(".")[2]
    *parents, last = target.split(".")
    if last in (own, "experts"):
        # A full name is of one layer. Its beginning may be missing in either of the two.
        short, long = sorted((target, layer), key=len)
        return not parents or own != last or long == short or long.endswith(f".{short}")
    # "experts.0.gate_proj": what vLLM calls the parts of a packed module.
    return own in parents or "experts" in parents


def flagged(config: Any) -> bool:
    """Whether `lora_target_modules` is set; ``config`` is the `LoRAConfig`."""
    return getattr(config, "target_modules", None) is not None


def leaves_out(config: Any, name: str, packed: dict[str, list[str]]) -> bool:
    """Whether `lora_target_modules` leaves out the module ``name`` of an adapter.

    Args:
        config: the `LoRAConfig`.
        packed: the manager's ``packed_modules_mapping``.
    """
    targets = getattr(config, "target_modules", None)
    if targets is None:
        return False
    own = name.rpartition(".")[2]
    # A packed module is wrapped as a whole if the flag has it or one of its parts.
    modules = {own, *(whole for whole, parts in packed.items() if own in parts)}
    parts = {part for module in modules for part in packed.get(module, ())}
    return {name, *modules, *parts}.isdisjoint(targets)


def cure(moe_config: Any) -> str:
    """What helps where experts without a backend for LoRA end the start.

    Args:
        moe_config: the layer's `FusedMoEConfig`, if it has one.
    """
    from vllm.config.lora import LoRAConfig

    if hasattr(LoRAConfig, "target_modules"):
        text = (
            f"If no adapter targets routed experts, say so: {FLAG} with the modules they do "
            "target, such as q_proj k_proj v_proj o_proj."
        )
    else:
        text = f"If no adapter targets routed experts, name all of them in {DECLARED}."
    asked = getattr(moe_config, "moe_backend", "auto")
    return text if asked == "auto" else f"{text} Or leave out --moe-backend {asked}."


def text(config: Any, what: str, add: Iterable[str]) -> str:
    """Why ``what`` cannot be applied, and what to do.

    Args:
        config: the `LoRAConfig`.
        what: tensors and modules, as the subject of the sentence.
        add: what the flag would have to name.
    """
    targets = getattr(config, "target_modules", None)
    if targets is not None:
        words = " ".join(sorted({*targets, *add}))
        return (
            f"{what}, which {FLAG} {' '.join(sorted(targets))} leaves out: there it would be "
            f"ignored. Nothing was loaded. Start the engine with {FLAG} {words}, or without it."
        )
    return (
        f"{what}, which run without LoRA since no adapter of {DECLARED} targets routed experts: "
        f"there it would be ignored. Nothing was loaded. Name the adapter in {DECLARED}, or start "
        "the engine with VLLM_MOE_LORA=-untargeted-experts."
    )
