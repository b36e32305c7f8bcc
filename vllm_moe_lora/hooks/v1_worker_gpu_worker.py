"""vllm/v1/worker/gpu_worker.py: the dummy batch of a data-parallel rank without requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _execute_dummy_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_dummy_batch(self: Any) -> None:
        from ..layers.data_parallel import idle

        with idle(self.model_runner):
            original(self)

    return execute_dummy_batch


HOOKS = (
    Hook(
        feature="data-parallel",
        target="vllm.v1.worker.gpu_worker:Worker.execute_dummy_batch",
        make=_execute_dummy_batch,
        releases=">=0.30,<0.34",
        why="a rank without requests removes all its adapters with each dummy batch, also those "
        "of tokens that other ranks send to its experts",
        upstream="",
        until="a dummy batch leaves the adapters alone",
    ),
)
