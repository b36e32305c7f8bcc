"""vllm/lora/lora_model.py: reads an adapter from a folder or from tensors in memory."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import MethodType
from typing import Any

from ..patching import Hook


def _from_local_checkpoint(original: MethodType) -> Any:
    def from_local_checkpoint(
        cls: type[Any],
        /,
        lora_dir: str,
        expected_lora_modules: set[str],
        peft_helper: Any,
        **more: Any,
    ) -> Any:
        from ..adapters import config, folder
        from ..adapters.errors import AdapterError
        from ..fitting.memory import PausedGC
        from ..fitting.read import read, reads_all

        path, refused = Path(lora_dir), None
        with PausedGC() as paused:
            tensors = None
            if not more.get("tensorizer_config_dict"):
                get = folder.tensors if reads_all() else folder.tensors_if_experts
                tensors = get(path)
            if tensors is None:
                paused.release()
                try:
                    return original(lora_dir, expected_lora_modules, peft_helper, **more)
                except ValueError as error:
                    # Upstream does not know a module's name. fitting/fit.py may; if it does not,
                    # it raises this error.
                    refused = error
                try:
                    tensors = folder.tensors(path)
                except AdapterError:
                    raise refused from None
            peft_helper.moe_lora_nemo = config.nemo_config(path)
            if (number := more.get("lora_model_id")) is None:
                number = original.__func__.__globals__["get_lora_id"]()
            return read(
                cls,
                refused,
                lora_model_id=number,
                tensors=tensors,
                peft_helper=peft_helper,
                **{key: more[key] for key in _passed(cls) if key in more},
            )

    return classmethod(from_local_checkpoint)


def _passed(cls: type[Any]) -> list[str]:
    """Return the parameters of this release's `from_lora_tensors` after peft_helper, in order."""
    return list(inspect.signature(cls.from_lora_tensors).parameters)[3:]


def _from_lora_tensors(original: MethodType) -> Any:
    def from_lora_tensors(
        cls: type[Any],
        /,
        lora_model_id: int,
        tensors: dict[str, Any],
        peft_helper: Any,
        *args: Any,
        **more: Any,
    ) -> Any:
        if getattr(peft_helper, "moe_lora_ready", False):
            return original(lora_model_id, tensors, peft_helper, *args, **more)
        from ..adapters import names
        from ..fitting.read import objection, read

        refused, positional = None, dict(zip(_passed(cls), args, strict=False))
        if not names.touches_experts(tensors):
            skipped = {**positional, **more}.get("skip_prefixes")
            found = objection(cls, tensors, peft_helper, skipped)
            try:
                lora = original(lora_model_id, tensors, peft_helper, *args, **more)
                lora.moe_lora_objection = found  # for a MoE model, see fitting/fit.py
                return lora
            except ValueError as error:
                refused = error
        return read(
            cls,
            refused,
            lora_model_id=lora_model_id,
            tensors=tensors,
            peft_helper=peft_helper,
            **positional,
            **more,
        )

    signature = inspect.signature(original.__func__)  # `_passed` reads it
    from_lora_tensors.__signature__ = signature  # type: ignore[attr-defined]
    return classmethod(from_lora_tensors)


HOOKS = (
    Hook(
        feature="adapters",
        target="vllm.lora.lora_model:LoRAModel.from_local_checkpoint",
        make=_from_local_checkpoint,
        releases=">=0.13,<0.34",
        why="adapters whose routed experts have another layout than vLLM's are refused or, because "
        "only the last part of a name is checked, accepted and then ignored; and reading an "
        "adapter with one tensor per expert is slow",
        upstream="https://github.com/vllm-project/vllm/issues/40005",
        until="upstream recognises every layout of routed experts and accounts for each tensor",
    ),
    Hook(
        feature="adapters",
        target="vllm.lora.lora_model:LoRAModel.from_lora_tensors",
        make=_from_lora_tensors,
        releases=">=0.13,<0.34",
        why="if an adapter is passed in memory, as verl and other trainers do, its packed experts "
        "are silently ignored",
        upstream="https://github.com/vllm-project/vllm/issues/48297",
        until="upstream recognises every layout of routed experts and accounts for each tensor",
    ),
)
