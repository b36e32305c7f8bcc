"""vllm/lora/worker_manager.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_moe_lora.patching import Hook


def _load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        try:
            return original(self, lora_request)
        except ValueError as error:
            limit = self.lora_config.max_lora_rank
            if self._adapter_manager._is_moe and "max_lora_rank" in str(error):
                found = _widest(Path(lora_request.lora_path), limit)
                if found is not None:
                    from vllm_moe_lora.adapters.errors import AdapterError
                    from vllm_moe_lora.store.strict import rank_text

                    raise AdapterError(rank_text(*found, limit)) from error
            raise

    return _load_adapter


def _widest(folder: Path, limit: int) -> tuple[str, int] | None:
    """The lora_A tensor of the largest rank above ``limit``, from the file's header alone."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    from safetensors import safe_open

    widest: tuple[str, int] | None = None
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - a safetensors handle, not a dict
            rank = tensors.get_slice(name).get_shape()[0]
            if "lora_A" in name and rank > max(limit, widest[1] if widest else 0):
                widest = (name, rank)
    return widest


HOOKS = (
    Hook(
        feature="adapter-errors",
        target="vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
        make=_load_adapter,
        releases=">=0.29,<0.34",
        why="a rank above max_lora_rank is reported without the tensor and the cure",
        upstream="",
        until="upstream names the tensor",
    ),
)
