#!/usr/bin/env python3
"""What returning the experts' routes costs on a CPU: its share of the time of a decode step.

    python benchmarks/rl_routes.py [--layers 4] [--batch 1 8] [--tokens 64]

Layers of Qwen1.5-MoE-A2.7B's shape, as in benchmarks/cpu_engine.py, LoRA enabled, eager. One engine
with --enable-return-routed-experts: everything that runs only because of the flag is timed where it
is called (capture in each router, the worker's and the scheduler's part), and so is the step. The
share is an upper bound, because the clock's own calls count as capture.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from cpu_engine import config

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Clock:
    """Adds up the seconds spent in functions that it wraps; nested calls count once."""

    def __init__(self) -> None:
        self.seconds, self.inside = 0.0, False

    def wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **more: Any) -> Any:
            if self.inside:
                return original(*args, **more)
            self.inside, began = True, time.perf_counter()
            try:
                return original(*args, **more)
            finally:
                self.inside = False
                self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    from vllm import LLM, SamplingParams
    from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    from vllm_moe_lora.rl import replay, routes

    clock = Clock()
    for name in ("begin", "snapshot", "_fill"):
        clock.wrap(routes, name)
    for name in ("begin", "prepare"):
        clock.wrap(replay, name)
    for name in ("build_connector_meta", "take_output", "request_finished"):
        clock.wrap(AuxOutputSchedulerConnector, name)
    with tempfile.TemporaryDirectory() as made:
        Path(made, "config.json").write_text(json.dumps(config(options.layers, "bf16")))
        llm = LLM(
            made,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=max(options.batch),
            disable_log_stats=True,
            enable_lora=True,
            max_lora_rank=16,
            enable_return_routed_experts=True,
        )
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    for module in model.modules():
        if isinstance(module, MoERunner):
            clock.wrap(module.router, "capture_fn")
    print(f"{options.layers} layers\nbatch  ms a step  ms for routes  share")
    for batch in options.batch:
        params = SamplingParams(max_tokens=options.tokens, ignore_eos=True, detokenize=False)
        for i in range(batch):
            prompt = {"prompt_token_ids": [(7 * j + i) % 1000 for j in range(16)]}
            llm.llm_engine.add_request(f"{batch}-{i}", prompt, params)
        for _ in range(8):  # the prompts, and some steps to get warm
            llm.llm_engine.step()
        clock.seconds, steps, began = 0.0, 0, time.perf_counter()
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            steps += 1
        whole = time.perf_counter() - began
        share = clock.seconds / whole
        print(
            f"{batch:5}  {1e3 * whole / steps:9.2f}  {1e3 * clock.seconds / steps:13.3f}  "
            f"{100 * share:4.1f} %"
        )


if __name__ == "__main__":
    main()
