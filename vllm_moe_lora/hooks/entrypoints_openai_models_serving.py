"""vllm/entrypoints/openai/models/serving.py"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from ..patching import Hook


def _load_lora_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    async def load_lora_adapter(self: Any, *args: Any, **more: Any) -> Any:
        answer = await original(self, *args, **more)
        error = getattr(answer, "error", None)
        if error is not None and str(error.message).startswith("LoRA adapter "):
            error.type, error.code = "BadRequestError", HTTPStatus.BAD_REQUEST.value
        request: Any = args[0] if args else more.get("request")
        if error is None and (kept := self.lora_requests.get(request.lora_name)):
            kept.load_inplace = False  # it was; its requests are not to do so again
        return answer

    return load_lora_adapter


HOOKS = (
    Hook(
        feature="safe-loading",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        make=_load_lora_adapter,
        releases=">=0.29,<0.34",
        why="an adapter that does not fit is answered as an internal error of the server; one that "
        "was loaded with load_inplace is loaded again for each of its requests",
        upstream="",
        until="upstream answers 400",
    ),
)
