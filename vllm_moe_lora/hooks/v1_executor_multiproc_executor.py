"""vllm/v1/executor/multiproc_executor.py: calls of all workers, one of which fails or ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _collective_rpc(original: Callable[..., Any]) -> Callable[..., Any]:
    def collective_rpc(self: Any, *args: Any, **more: Any) -> Any:
        config = getattr(self, "vllm_config", None)  # vLLM's own tests make executors without
        if config is None or config.lora_config is None or not config.model_config.is_moe:
            return original(self, *args, **more)
        from ..loading import replies

        queues = mine = getattr(self, "response_mqs", None)
        if queues and more.get("unique_reply_rank") is None:
            self.response_mqs = mine = replies.of_all_ranks(queues)
        try:
            return original(self, *args, **more)
        except Exception as error:
            if self.is_failed:
                raise RuntimeError(replies.WORKER_ENDED) from error
            raise
        finally:
            if mine is not queues and self.response_mqs is mine:  # not if a worker ended meanwhile
                self.response_mqs = queues

    return collective_rpc


HOOKS = (
    Hook(
        feature="safe-loading",
        target="vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc",
        make=_collective_rpc,
        releases=">=0.29,<0.34",
        why="after the workers of several ranks have refused an adapter, the next call gets the "
        "error of the second rank, because upstream raises the first and leaves the others in "
        "their queues",
        upstream="",
        until="upstream reads the replies of all ranks before it raises an error",
    ),
)
