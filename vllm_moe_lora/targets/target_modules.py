"""Decides for each MoE layer, before it is built, whether an adapter may target its routed experts.

A layer that no adapter may target is built without LoRA: vLLM chooses the backend that it would
choose without LoRA, the layer is not wrapped, and no slots are allocated for it. An adapter that
has LoRA on such a layer is refused when it is loaded (`fitting/strict.py`), not ignored.

Two settings can exclude a layer. One is --lora-target-modules (vLLM 0.19 and later), which has the
meaning that vLLM gives it. The other is --lora-modules, if none of its adapters has LoRA on routed
experts and no adapter can be added to the server later (`server_adapters.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FLAG = "--lora-target-modules"
SERVER_FLAG = "--lora-modules"
# Entry in `VllmConfig.additional_config`, which reaches every process of the engine: no adapter of
# this server has LoRA on routed experts.
NO_EXPERTS_KEY = "moe_lora_no_experts"


def may_target(config: Any, layer: str) -> bool:
    """Whether an adapter may have LoRA on the routed experts of ``layer``.

    Args:
        config: the `VllmConfig`. Without LoRA the answer is no.
        layer: the name that the model gave the layer, as in "model.layers.0.mlp.experts". It may be
            "", or differ from the module's name in the model. The answer is yes if this name does
            not show that the layer is left out.
    """
    if config.lora_config is None:
        return False
    targets = getattr(config.lora_config, "target_modules", None)
    if targets is not None:
        return not layer or any(_may_mean(target, layer) for target in targets)
    more = getattr(config, "additional_config", None)
    no_experts = isinstance(more, dict) and bool(more.get(NO_EXPERTS_KEY))
    # `server_adapters` has looked for tensors of modules called "experts", and only for these.
    return not (no_experts and layer.endswith(".experts"))


def may_target_experts(config: Any) -> bool:
    """Whether an adapter may have LoRA on routed experts of any layer, as far as flags say.

    Args:
        config: the `VllmConfig` of an engine with LoRA.
    """
    targets = getattr(config.lora_config, "target_modules", None)
    if targets is not None:
        return any("experts" in target.split(".") for target in targets)
    return may_target(config, "model.layers.0.mlp.experts")


def _may_mean(target: str, layer: str) -> bool:
    """Whether vLLM may read ``target``, a value of --lora-target-modules, as ``layer``."""
    own = layer.rpartition(".")[2]
    *parents, last = target.split(".")
    if last in (own, "experts"):
        # A full name means one layer. The beginning of the name may be missing in either of them.
        short, long = sorted((target, layer), key=len)
        return not parents or own != last or long == short or long.endswith(f".{short}")
    # "experts.0.gate_proj": vLLM's name for a part of the packed module "experts".
    return own in parents or "experts" in parents


def flagged(config: Any) -> bool:
    """Whether --lora-target-modules is set; ``config`` is the `LoRAConfig`."""
    return getattr(config, "target_modules", None) is not None


def leaves_out(config: Any, name: str, packed: dict[str, list[str]]) -> bool:
    """Whether --lora-target-modules is set and leaves out a module.

    Args:
        config: the `LoRAConfig`.
        name: the module's name in an adapter.
        packed: the manager's ``packed_modules_mapping``.
    """
    targets = getattr(config, "target_modules", None)
    if targets is None:
        return False
    own = name.rpartition(".")[2]
    # vLLM wraps a packed module as a whole if the flag names it or one of its parts.
    modules = {own, *(whole for whole, parts in packed.items() if own in parts)}
    parts = {part for module in modules for part in packed.get(module, ())}
    return {name, *modules, *parts}.isdisjoint(targets)


def cure(moe_config: Any) -> str:
    """What the user can do if the engine does not start because experts have no backend for LoRA.

    Args:
        moe_config: the layer's `FusedMoEConfig`, or None.
    """
    from vllm.config.lora import LoRAConfig

    if hasattr(LoRAConfig, "target_modules"):
        text = (
            f"If no adapter targets routed experts, set {FLAG} to the modules that adapters do "
            "target, such as q_proj k_proj v_proj o_proj."
        )
    else:
        text = f"If no adapter targets routed experts, name all adapters in {SERVER_FLAG}."
    asked = getattr(moe_config, "moe_backend", "auto")
    return text if asked == "auto" else f"{text} Or leave out --moe-backend {asked}."


def left_out_message(config: Any, what: str, add: Iterable[str]) -> str:
    """The message for an adapter with LoRA on modules that run without LoRA.

    Args:
        config: the `LoRAConfig`.
        what: the beginning of the message, which ends with the tensors and modules.
        add: the modules that --lora-target-modules would also have to name.
    """
    targets = getattr(config, "target_modules", None)
    if targets is not None:
        words = " ".join(sorted({*targets, *add}))
        return (
            f"{what}, which {FLAG} {' '.join(sorted(targets))} leaves out: it would be ignored "
            f"there. Nothing was loaded. Start the engine with {FLAG} {words}, or without the flag."
        )
    return (
        f"{what}, which run without LoRA because no adapter of {SERVER_FLAG} targets routed "
        "experts: it would be ignored there. Nothing was loaded. Name the adapter in "
        f"{SERVER_FLAG}, or start the engine with VLLM_MOE_LORA=-untargeted-experts."
    )
