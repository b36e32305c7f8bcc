"""vllm/v1/engine/input_processor.py: checks the routes that a request brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, **more: Any) -> Any:
        request = original(self, *args, **more)
        if request.sampling_params is not None and request.sampling_params.extra_args:
            from vllm.exceptions import VLLMValidationError

            from ..rl import replay

            try:
                replay.admit(self.vllm_config, request)
            except ValueError as error:
                raise VLLMValidationError(str(error), parameter="extra_args") from None
        return request

    return process_inputs


HOOKS = (
    Hook(
        feature="routes",
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        make=_process_inputs,
        releases=">=0.31,<0.34",
        why="a request cannot bring the routes that its tokens are to take",
        upstream="",
        until="upstream replays routes",
    ),
)
