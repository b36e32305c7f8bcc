"""`engine.main`, with workers that are forks of this process: they need not import vLLM again.

vLLM's CPU platform spawns them. test_tensor_parallel.py has such.
"""

from __future__ import annotations

import multiprocessing
import sys

from vllm.v1.engine import coordinator, utils
from vllm.v1.executor import multiproc_executor

from vllm_moe_lora.tiny import engine

for module in (coordinator, multiproc_executor, utils):
    module.get_mp_context = lambda: multiprocessing.get_context("fork")

if __name__ == "__main__":
    engine.main(*sys.argv[1:])
