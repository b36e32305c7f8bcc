"""vllm/entrypoints/openai/models/serving.py: the endpoint /v1/load_lora_adapter."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from ..patching import Hook


def _answer_400(original: Callable[..., Any]) -> Callable[..., Any]:
    """From 0.33 on: answer 400 for an adapter that does not fit."""

    async def load_lora_adapter(self: Any, *args: Any, **more: Any) -> Any:
        answer = await original(self, *args, **more)
        error = getattr(answer, "error", None)
        # The errors of this package begin like this, see fitting/explain.py.
        if error is not None and str(error.message).startswith("LoRA adapter "):
            error.type, error.code = "BadRequestError", HTTPStatus.BAD_REQUEST.value
        return answer

    return load_lora_adapter


def _answer_400_and_reset(original: Callable[..., Any]) -> Callable[..., Any]:
    """Up to 0.32: also reset load_inplace of the request that the server keeps."""
    answering = _answer_400(original)

    async def load_lora_adapter(self: Any, *args: Any, **more: Any) -> Any:
        answer = await answering(self, *args, **more)
        request: Any = args[0] if args else more.get("request")
        loaded = getattr(answer, "error", None) is None
        if loaded and (kept := self.lora_requests.get(request.lora_name)):
            kept.load_inplace = False
        return answer

    return load_lora_adapter


def _resolve_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        from ..loading import admit

        with admit.refusals() as refused:
            answer = await original(self, lora_name)
        error = getattr(answer, "error", None)
        if error is not None and refused:
            error.message = f"{error.message} {refused[-1]}"
        return answer

    return resolve_lora


_COMMON: dict[str, Any] = {
    "feature": "safe-loading",
    "target": "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
    "upstream": "",
}
_WHY = "an adapter that does not fit the model is answered with HTTP 500, as a server error"

HOOKS = (
    Hook(
        feature="safe-loading",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.resolve_lora",
        make=_resolve_lora,
        releases=">=0.29,<0.34",
        why="an adapter that a resolver found and that does not fit is answered without the reason",
        upstream="",
        until="upstream gives the reason why a resolved adapter could not be loaded",
    ),
    Hook(
        make=_answer_400,
        releases=">=0.33,<0.34",
        why=_WHY,
        until="upstream answers 400",
        **_COMMON,
    ),
    Hook(
        make=_answer_400_and_reset,
        releases=">=0.29,<0.33",
        why=f"{_WHY}; and the server keeps the flag load_inplace of the load, so each request of "
        "that adapter loads it again",
        until="0.33, which resets load_inplace; it still answers 500",
        **_COMMON,
    ),
)
