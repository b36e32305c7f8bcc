"""vllm/config/vllm.py: the key of compiled artefacts, compilation on a CPU, routed experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _compute_hash(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_hash(self: Any, *args: Any, **more: Any) -> str:
        key = str(original(self, *args, **more))
        # Up to 0.13 a model's config does not say whether it has experts.
        if self.lora_config is None or not getattr(self.model_config, "is_moe", True):
            return key
        from .. import fingerprint

        return fingerprint.combined(key)

    return compute_hash


def _post_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __post_init__(self: Any) -> None:
        if self.lora_config is None:
            return original(self)
        from ..layers.cpu import compiled

        before = compiled.requested(self)
        original(self)
        compiled.keep_mode(self, before)
        return None

    return __post_init__


def _verify_aux_output_compatibility(original: Callable[..., Any]) -> Callable[..., Any]:
    def _verify_aux_output_compatibility(self: Any) -> None:
        if not self.aux_output_config.enabled or self.use_v2_model_runner:
            original(self)
            return
        from ..rl import routes

        original(routes.RunnerV2Config(self))

    return _verify_aux_output_compatibility


HOOKS = (
    # Upstream's rule is in vllm/platforms/cpu.py, which cannot have a hook: a patched tree would
    # ask for the platform while that file is imported. Asking while this file is imported is too
    # early, too: so the hook has no `platforms`, and asks when it is called.
    Hook(
        feature="cpu-compile",
        target="vllm.config.vllm:VllmConfig.__post_init__",
        make=_post_init,
        releases=">=0.30,<0.34",
        why="with LoRA the CPU platform switches torch.compile off, because it would trace the "
        "adapters of one batch as constants; here LoRA consists of operators, which are not traced",
        upstream="",
        until="upstream's punica wrapper and experts are operators on the CPU, too",
    ),
    Hook(
        feature="routes",
        target="vllm.config.vllm:VllmConfig._verify_aux_output_compatibility",
        make=_verify_aux_output_compatibility,
        releases=">=0.31,<0.34",
        why="--enable-return-routed-experts is refused where vLLM uses model runner V1, as on a "
        "CPU",
        upstream="",
        until="upstream has no model runner V1 any more",
    ),
    Hook(
        feature="compile-cache",
        target="vllm.config.vllm:VllmConfig.compute_hash",
        make=_compute_hash,
        releases=">=0.11.1,<0.34",
        why="an artefact that torch.compile made without these changes, or with another version of "
        "them, has the same key: LoRA on a module that only these changes wrap, such as a gate, "
        "would be silently ignored",
        upstream="",
        until="upstream's key changes with the modules of the compiled model",
    ),
)
