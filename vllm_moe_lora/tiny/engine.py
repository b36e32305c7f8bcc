"""Run a real vLLM engine in a child process on a list of requests and bring back log-probs.

A child for each engine keeps engines apart: the plugin patches the process it runs in, and vLLM
leaves state behind. The child runs this file by its path.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Runs a command as `subprocess.run` does. Tests put something faster here.
launch: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run

Request = tuple[list[int], str | None]  # prompt token ids, adapter name or None for the base model


@dataclass
class Job:
    """What one engine is to do.

    Attributes:
        model: checkpoint folder.
        adapters: name -> adapter folder; ids are their positions, from 1.
        rounds: batches, one `LLM.generate` call each.
        max_tokens: greedy tokens to generate for each request.
        vocab: log-probs wanted at each step (the whole vocabulary of a tiny model).
        options: further keyword arguments of `vllm.LLM`; ``enable_lora`` is set with adapters.
        load: adapters to load on their own after the rounds; each outcome is "ok" or the error.
            After each, the first round is asked again.
        by_request: load them by a request that names them, not by `add_lora`.
        import_plugin: ``import vllm_moe_lora`` before vLLM is touched.
    """

    model: str
    adapters: dict[str, str] = field(default_factory=dict)
    rounds: list[list[Request]] = field(default_factory=list)
    max_tokens: int = 1
    vocab: int = 512
    options: dict[str, Any] = field(default_factory=dict)
    load: list[str] = field(default_factory=list)
    by_request: bool = False
    import_plugin: bool = False


class EngineError(RuntimeError):
    """The engine process failed; `log` is what it printed."""

    def __init__(self, log: str) -> None:
        super().__init__(last_error(log))
        self.log = log


def last_error(log: str) -> str:
    """The line of a log that names the error: the last that starts like an exception's text."""
    lines = [line for line in log.splitlines() if "WARNING" not in line]
    lines = [re.sub(r"^(\[rank\d+\]:|.*?\])\s+", "", line).strip() for line in lines]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    inner = [line for line in named if "Engine core initialization failed" not in line]
    return (inner or named or lines[-1:] or ["the engine printed nothing"])[-1]


def run(
    job: Job,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    script: str | Path = __file__,
) -> tuple[list[list[tuple[list[int], torch.Tensor]]], list[str], str]:
    """Run ``job`` in a child process.

    Args:
        job: what to do.
        env: on top of this process's environment.
        timeout: seconds.
        script: what the child runs; it calls `main` of this file.

    Returns:
        For each round, for each request: generated token ids and their log-probs
        ([max_tokens, vocab] fp32, of the full distribution before each token). Then the outcomes
        of ``job.load``, and the log.

    Raises:
        EngineError: the child failed or ran out of time.
    """
    import torch

    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Engines here are eager; the sampler's one compiled function would take 3 s.
        "TORCHDYNAMO_DISABLE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        spec, result = Path(folder, "job.json"), Path(folder, "result.pt")
        spec.write_text(json.dumps(asdict(job)))
        # By file, not by module name: only the job decides whether our package is imported.
        command = [sys.executable, str(script), str(spec), str(result)]
        try:
            done = launch(
                command,
                env={**os.environ, **settings, **(env or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            out = error.stdout or b""
            text = out.decode(errors="replace") if isinstance(out, bytes) else out
            raise EngineError(f"{text}\nTimeoutError: no answer in {timeout} s") from error
        if done.returncode or not result.exists():
            raise EngineError(done.stdout)
        answers, outcomes = torch.load(result, weights_only=True)
    return answers, outcomes, done.stdout


def main(spec: str, result: str) -> None:
    job = Job(**json.loads(Path(spec).read_text()))
    if job.import_plugin:
        import vllm_moe_lora  # noqa: F401
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_logprobs": job.vocab,
        "disable_log_stats": True,
    }
    if job.adapters:
        options |= {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16, "max_cpu_loras": 64}
    llm = LLM(job.model, **{**options, **job.options})
    adapters = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(job.adapters.items(), start=1)
    }
    sampling = SamplingParams(
        max_tokens=job.max_tokens,
        temperature=0,
        ignore_eos=True,
        logprobs=job.vocab,
        detokenize=False,
    )

    def ask(requests: Sequence[Request]) -> list[tuple[list[int], torch.Tensor]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            sampling,
            lora_request=[adapters[name] if name else None for _, name in requests],
            use_tqdm=False,
        )
        answers = []
        for output in outputs:
            steps = torch.full((len(output.outputs[0].token_ids), job.vocab), float("-inf"))
            for step, entry in zip(steps, output.outputs[0].logprobs, strict=True):
                for token, logprob in entry.items():
                    step[token] = logprob.logprob
            answers.append((list(output.outputs[0].token_ids), steps))
        return answers

    answers = [ask(requests) for requests in job.rounds]
    outcomes = []
    for name in job.load:
        try:
            if job.by_request:
                ask([([1, 2, 3], None), ([1, 2, 3], name)])
            else:
                llm.llm_engine.add_lora(adapters[name])
            outcomes.append("ok")
        except Exception as error:  # the outcome is the error, whatever it is
            outcomes.append(f"{type(error).__name__}: {error}")
        answers.append(ask(job.rounds[0]) if job.rounds else [])
    torch.save((answers, outcomes), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
