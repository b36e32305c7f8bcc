"""Runs a vLLM engine in a child process on a list of requests, and returns log-probs.

Each engine gets a process of its own, because the plugin changes the process it runs in, and vLLM
leaves state behind. The child runs this file by its path: `run` is for the parent, `main` for the
child.
"""

from __future__ import annotations

import importlib.util
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

# Starts the child, with the arguments of `subprocess.run`. Tests replace it by something faster.
launch: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run

# The environment of an engine of `run`, on top of this process's.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Engines here are eager; the sampler's one compiled function would take 3 s.
    "TORCHDYNAMO_DISABLE": "1",
}

# The prompt's token ids, and the name of the adapter; None for the base model.
Request = tuple[list[int], str | None]


@dataclass
class Job:
    """The work of one engine.

    Attributes:
        model: folder of the checkpoint.
        adapters: name -> folder. Their ids are 1, 2, ... in this order. If there are any, the
            engine gets ``enable_lora``.
        rounds: batches of requests; each is one call of `LLM.generate`.
        max_tokens: how many tokens to generate for each request, greedily.
        vocab: how many log-probs to return for each token: the size of the vocabulary.
        options: further keyword arguments of `vllm.LLM`.
        load: names of adapters to load after the rounds, one by one. After each, the first round
            is repeated.
        by_request: load them by sending a request that names them, instead of by `add_lora`.
        import_plugin: whether to ``import vllm_moe_lora`` before vLLM.
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
    """The engine's process failed. `log` is what it printed; the text is the error in it."""

    def __init__(self, log: str) -> None:
        super().__init__(last_error(log))
        self.log = log


def home() -> str:
    """Return the name of the package whose hooks a child has: a patched vLLM has its own."""
    patched = "vllm.lora.moe_lora"
    return patched if importlib.util.find_spec(patched) else "vllm_moe_lora"


def last_error(log: str) -> str:
    """Return the line of a log that names the error.

    This is the last line that begins with the name of an exception, or else the last line.
    """
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
        env: environment variables to add to those of this process.
        timeout: seconds to wait.
        script: the file that the child runs. It has to call `main` of this file.

    Returns:
        Three things. For each round, for each request: the generated token ids, and log-probs
        [tokens, vocab] fp32 of the distribution from which each token was taken. For each adapter
        of ``job.load``: "ok" or the error; its repetition of the first round is appended to the
        rounds. And what the child printed.

    Raises:
        EngineError: the child failed or took too long.
    """
    (answers, outcomes), log = saved_by(script, asdict(job), env, timeout)
    return answers, outcomes, log


def saved_by(
    script: str | Path,
    job: dict[str, Any],
    env: dict[str, str] | None = None,
    timeout: float = 300,
    first: Sequence[str] = (),
) -> tuple[Any, str]:
    """Run ``script`` in a child process, with a job to read and a file to save its result to.

    Args:
        script: the file. Its arguments are ``first``, the job's file (JSON) and the result's file,
            which `torch.load` reads.
        job: what to do.
        env: environment variables to add to `SETTINGS` and those of this process.
        timeout: seconds to wait.
        first: arguments before the two files.

    Returns:
        The result, and what the child printed.

    Raises:
        EngineError: the child failed or took too long.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        spec, result = Path(folder, "job.json"), Path(folder, "result.pt")
        spec.write_text(json.dumps(job))
        # By the file's path: `python -m` would import our package, and that is up to the job.
        command = [sys.executable, str(script), *first, str(spec), str(result)]
        try:
            done = launch(
                command,
                env={**os.environ, **SETTINGS, **(env or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            out = error.stdout or b""
            text = out.decode(errors="replace") if isinstance(out, bytes) else out
            raise EngineError(f"{text}\nTimeoutError: not finished in {timeout} s") from error
        if done.returncode or not result.exists():
            raise EngineError(done.stdout)
        return torch.load(result, weights_only=True), str(done.stdout)


def main(spec: str, result: str) -> None:
    """Run the job in the file ``spec`` (JSON) and save what it returns to the file ``result``."""
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
        except Exception as error:  # any error is an outcome
            outcomes.append(f"{type(error).__name__}: {error}")
        answers.append(ask(job.rounds[0]) if job.rounds else [])
    torch.save((answers, outcomes), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
