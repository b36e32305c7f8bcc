"""vLLM's CPU worker, without the pool of memory that it wants from any platform but the CPU."""

from __future__ import annotations

from contextlib import nullcontext

from vllm.v1.worker.cpu_worker import CPUWorker


class StandInWorker(CPUWorker):
    def _maybe_get_memory_pool_context(self, tag):
        return nullcontext()
