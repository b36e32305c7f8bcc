"""vllm/lora/model_manager.py: wraps the model's modules, registers and activates adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..log import flush_deferred, get_logger
from ..patching import Hook

logger = get_logger(__name__)
GATE = "shared_expert_gate"


def _create_lora_modules(original: Callable[..., Any]) -> Callable[..., Any]:
    def _create_lora_modules(self: Any) -> None:
        from ..fitting.moe_layers import in_group, punica_wrappers, serves_moe
        from ..layers.shared_experts import aliases, gates
        from ..loading import memory
        from ..models.repair import cast_inputs, resize_v, whole_batches

        flush_deferred()
        # Up to 0.13 this gate is a torch.nn.Linear, for which vLLM has no LoRA layer.
        if gates.as_vllm_linear(self.model, {GATE}) and GATE not in self.supported_lora_modules:
            self.supported_lora_modules.append(GATE)
        original(self)
        if not serves_moe(self):
            return
        memory.keep_old_mapper_name(self.model)
        for wrapper in punica_wrappers(self):
            wrapper.moe_lora = True  # read by hooks/lora_punica_cpu.py
            if in_group(self):  # read by layers/gpu/data_parallel.py
                wrapper.moe_lora_group = wrapper.token_mapping_meta.moe_lora_group = True
        resize_v(self)
        cast_inputs(self.model, self.modules)
        whole_batches(self.model)
        aliases.drop_duplicates(self.modules)
        moved = aliases.rewire(self.model, self.modules)
        if moved:
            logger.debug("LoRA layers now also serve %d aliases: %s", len(moved), moved)
        self.moe_lora_unreachable = aliases.unwrapped_references(self.model, self.modules)

    return _create_lora_modules


def _create_lora_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_lora_manager(model: Any, *args: Any, **more: Any) -> Any:
        lora_config, moe = more["lora_config"], more["vllm_config"].model_config.is_moe
        if moe and lora_config.fully_sharded_loras:
            lora_config.fully_sharded_loras = False
            logger.info("--fully-sharded-loras has no effect on MoE models on a CPU")
        return original(model, *args, **more)

    return create_lora_manager


def _add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def _add_adapter(self: Any, lora: Any) -> None:
        from ..fitting.moe_layers import serves_moe

        if serves_moe(self) or hasattr(lora, "moe_lora"):
            from ..fitting.fit import fit
            from ..loading import versions

            fit(self, lora)
            versions.count_load(self, lora.id)
        original(self, lora)

    return _add_adapter


def _deactivate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def _deactivate_adapter(self: Any, lora_id: int) -> None:
        from ..layers.cpu import slots

        active = lora_id in self.lora_index_to_id
        slot = self.lora_index_to_id.index(lora_id) if active else None
        original(self, lora_id)
        if slot is not None:
            slots.free(self, slot)

    return _deactivate_adapter


def _activate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def activate_adapter(self: Any, lora_id: int) -> Any:
        from ..loading import assigned

        before = lora_id in self._active_adapters
        try:
            if not before:
                assigned.check(self, lora_id)
            with assigned.only_slot(self, lora_id):
                return original(self, lora_id)
        except Exception:
            from ..fitting.moe_layers import serves_moe

            if serves_moe(self) and not before:
                # Upstream leaves it active (up to 0.32) and registered (0.33, too). A registered
                # adapter is not read again, even if its files were corrected, and it takes one of
                # the --max-cpu-loras places, which loading/front_end.py counts as free.
                self.deactivate_adapter(lora_id)
                self._registered_adapters.pop(lora_id, None)
            raise

    return activate_adapter


def _create_with_pages(original: Callable[..., Any]) -> Callable[..., Any]:
    # In a patched tree two decorators are applied here, and each finds its hook by this name.
    @functools.wraps(original, assigned=("__name__",))
    def create_lora_manager(model: Any, *args: Any, **more: Any) -> Any:
        from ..layers.gpu import pages

        config: Any = more.get("vllm_config")
        if not pages.possible(config):
            return original(model, *args, **more)
        return pages.created(model, config.lora_config, lambda: original(model, *args, **more))

    return create_lora_manager


def _free_pages(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original, assigned=("__name__",))
    def _deactivate_adapter(self: Any, lora_id: int) -> None:
        from ..layers.gpu import pages

        original(self, lora_id)
        pages.free_unused(self)

    return _deactivate_adapter


_PAGES: dict[str, Any] = {
    "feature": "moe-kernels",
    "releases": ">=0.28,<0.34",
    "platforms": ("cuda",),  # the device type of ROCm is "cuda", too
    "upstream": "",
    "until": "the hooks of _create_lora_a_weights go",
}

_FREE: dict[str, Any] = {
    "feature": "cpu-experts",
    "target": "vllm.lora.model_manager:LoRAModelManager._deactivate_adapter",
    "make": _deactivate_adapter,
    "platforms": ("cpu",),
    "why": "a slot keeps what its last adapter had until another one takes it; on a CPU that is "
    "the memory of an adapter that was removed",
    "upstream": "",
    "until": "the hooks of _create_lora_a_weights go",
}

HOOKS = (
    Hook(
        target="vllm.lora.model_manager:LoRAModelManager._deactivate_adapter",
        make=_free_pages,
        why="a slot keeps what its last adapter had until another one takes it; the next adapter "
        "may need those pages in another slot",
        **_PAGES,
    ),
    Hook(
        target="vllm.lora.model_manager:create_lora_manager",
        also=("vllm.lora.worker_manager:create_lora_manager",),
        make=_create_with_pages,
        why="all layers need pages for the same number of ranks, so their number has to be known "
        "before the first one gets its pages",
        **_PAGES,
    ),
    Hook(releases=">=0.24,<0.28", **_FREE),
    Hook(releases=">=0.30,<0.34", **_FREE),
    Hook(
        feature="cpu-experts",
        target="vllm.lora.model_manager:create_lora_manager",
        also=("vllm.lora.worker_manager:create_lora_manager",),
        make=_create_lora_manager,
        releases=">=0.30,<0.34",
        platforms=("cpu",),
        why="with --fully-sharded-loras the first request with an adapter stops the engine: the "
        "CPU experts need whole factors on each rank. The answers are the same without the flag",
        upstream="",
        until="the CPU experts take factors that are sharded over ranks",
    ),
    Hook(
        feature="shared-experts",
        target="vllm.lora.model_manager:LoRAModelManager._create_lora_modules",
        make=_create_lora_modules,
        releases=">=0.13,<0.34",
        why="LoRA on shared_expert_gate, and on a router gate that the MoE layer owns, is silently "
        "ignored, because the forward pass uses a second name of the module, which still leads to "
        "the module without LoRA. Up to 0.19 LoRA on shared experts is written under one of their "
        "names and erased under the other",
        upstream="",
        until="upstream points every name of a wrapped module at its LoRA layer",
    ),
    Hook(
        feature="adapters",
        target="vllm.lora.model_manager:LoRAModelManager._add_adapter",
        make=_add_adapter,
        releases=">=0.13,<0.34",
        why="an adapter with LoRA on some experts or projections only, or with several ranks, is "
        "refused with an AssertionError without text. And some tensors are accepted and ignored: "
        "tensors for a module that the model does not have, tensors of a wrong shape, and tensors "
        "for kv_b_proj, which MLA multiplies into other weights",
        upstream="https://github.com/vllm-project/vllm/issues/55193",
        until="upstream accepts LoRA on some of the experts, and refuses an adapter that has a "
        "tensor which it does not use",
    ),
    Hook(
        feature="adapters",
        target="vllm.lora.model_manager:LoRAModelManager.activate_adapter",
        make=_activate_adapter,
        releases=">=0.13,<0.34",
        why="an adapter whose activation failed stays active up to 0.32, so later requests of it "
        "silently run the base model. In 0.33 it still stays registered, so a retry does not read "
        "its files again",
        upstream="",
        until="upstream also removes an adapter whose activation failed",
    ),
)
