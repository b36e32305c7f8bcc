#!/usr/bin/env python3
"""Several adapters on a MoE model in one batch, without a server.

    python examples/offline.py                          # a tiny random model, two adapters, a CPU
    python examples/offline.py MODEL NAME=ADAPTER ...   # your own

The import is all that the package needs. Where vLLM starts other processes, they find it by its
entry point.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def tiny(folder: Path) -> tuple[str, dict[str, str]]:
    """Make a random Qwen2-MoE model and two adapters on all of its modules."""
    from vllm_moe_lora.tiny import adapters, models

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the tiny model needs no more
    model = models.build("qwen2_moe", folder / "model")
    paths = {name: adapters.write(model, folder / name, seed=i) for i, name in enumerate("ab")}
    return str(model), {name: str(path) for name, path in paths.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            model = sys.argv[1]
            paths = dict(argument.split("=", 1) for argument in sys.argv[2:])
        else:
            model, paths = tiny(Path(folder))

        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        import vllm_moe_lora  # noqa: F401  before LLM(...)

        llm = LLM(
            model=model,
            enable_lora=True,
            max_loras=len(paths),
            max_lora_rank=16,
            skip_tokenizer_init=len(sys.argv) == 1,
            max_model_len=256,
        )
        requests = [LoRARequest(name, i, path) for i, (name, path) in enumerate(paths.items(), 1)]
        prompt = {"prompt_token_ids": list(range(20, 40))}
        params = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False)
        # One batch: the base model, then each adapter.
        answers = llm.generate(
            [prompt] * (1 + len(requests)), params, lora_request=[None, *requests]
        )
        for name, answer in zip(["base", *paths], answers, strict=True):
            print(f"{name}: {list(answer.outputs[0].token_ids)}")


if __name__ == "__main__":
    main()
