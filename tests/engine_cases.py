"""A checkpoint, its adapters and their oracles; how an engine's answers are compared with them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm_moe_lora.tiny import adapters, engine, oracle

# vLLM 0.32's rotary operator for the CPU misreads MLA's query, which has three dimensions. With
# --enforce-eager, and without any LoRA, DeepSeek differs from Hugging Face if a prompt has two
# tokens or more. These options choose the embedding in torch, which compiled engines have anyway.
ROTARY_IN_TORCH = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}

PROMPTS = [[1, 2, 3], [5, 9, 11, 300, 17, 44, 2, 8], list(range(20, 60))]


@dataclass
class Case:
    """A checkpoint for the engine, its full-precision twin, and adapters with their oracles."""

    folder: Path
    model: Path
    plain: Path
    adapters: dict[str, Path] = field(default_factory=dict)
    oracles: dict[str | None, list[torch.Tensor]] = field(default_factory=dict)

    def add(
        self, name: str, keep: Callable[[str], bool] = lambda name: True, **how: object
    ) -> None:
        """Make an adapter; its oracle is computed when first asked for."""
        self.adapters[name] = adapters.write(self.plain, self.folder / name, keep=keep, **how)

    def ask(
        self, *names: str | None, env: dict[str, str] | None = None, **options: object
    ) -> dict[str | None, list[torch.Tensor]]:
        """One engine, one batch of all `PROMPTS` for each name: log-probs after each prompt."""
        rounds: list[list[engine.Request]] = [[(p, name) for p in PROMPTS] for name in names]
        paths = {name: str(self.adapters[name]) for name in names if name is not None}
        job = engine.Job(str(self.model), paths, rounds, options=dict(options))
        answers, _, _ = engine.run(job, env)
        found = ([logprobs[-1] for _, logprobs in batch] for batch in answers)
        return dict(zip(names, found, strict=True))

    def want(self, name: str | None) -> list[torch.Tensor]:
        """The oracle's log-probs on `PROMPTS`: [len(prompt), vocab] each."""
        if name not in self.oracles:
            merged = self.plain
            if name is not None:
                target = self.folder / f"{name}-merged"
                merged = oracle.merge(self.plain, self.adapters[name], target)
            self.oracles[name] = oracle.log_probs(merged, PROMPTS)
        return self.oracles[name]

    def forced(self, name: str | None, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        """The oracle's log-probs [tokens, vocab] before each of ``tokens``, given those before."""
        self.want(name)  # writes the merged checkpoint
        checkpoint = self.plain if name is None else self.folder / f"{name}-merged"
        return oracle.log_probs(checkpoint, [prompt + tokens])[0][len(prompt) - 1 : -1]


TOP = 40
FP32_LIMIT = 1e-3  # fp32 against fp32: rounding in different orders over a few hundred products
SHARE = 0.10  # bf16, fp16 and INT4: of the adapter's own mean effect


def compare_fp32(got: list[torch.Tensor], case: Case, name: str | None) -> None:
    """Largest difference over the oracle's 40 likeliest tokens ≤ 1e-3, effect ≥ 20 times that."""
    for i, (have, want, base) in enumerate(zip(got, case.want(name), case.want(None), strict=True)):
        top = want[-1].topk(TOP).indices
        difference = (have - want[-1])[top].abs().max().item()
        assert difference <= FP32_LIMIT, f"{name}, prompt {i}: differs by {difference:.2e}"
        if name is not None:
            effect = (base[-1] - want[-1])[top].abs().max().item()
            assert effect >= 20 * FP32_LIMIT, f"{name}, prompt {i}: adapter does {effect:.2e} only"


def compare_low_precision(got: list[torch.Tensor], case: Case, name: str) -> None:
    """Mean difference over the oracle's 40 likeliest tokens ≤ 10 % of the adapter's mean effect."""
    differences, effects = [], []
    for have, want, base in zip(got, case.want(name), case.want(None), strict=True):
        top = want[-1].topk(TOP).indices
        differences.append((have - want[-1])[top].abs().mean())
        effects.append((base[-1] - want[-1])[top].abs().mean())
    difference, effect = torch.stack(differences).mean(), torch.stack(effects).mean()
    assert difference <= SHARE * effect, f"{name}: {difference:.4f} of an effect of {effect:.4f}"


def run_and_compare(case, names, *, load=(), env=None, **options):
    """Run an engine in fp32. Compare each name alone and all in one batch.

    Returns:
        The outcomes of loading ``load``, of which none changes an answer, and what was printed.
    """
    rounds = [[(p, name) for p in PROMPTS] for name in names]
    rounds.append([(p, name) for p in PROMPTS for name in names])
    job = engine.Job(
        str(case.model),
        {n: str(p) for n, p in case.adapters.items()},
        rounds,
        options={"dtype": "float32", **options},
        load=list(load),
    )
    answers, outcomes, log = engine.run(job, env)
    for i, name in enumerate(names):
        compare_fp32([lp[-1] for _, lp in answers[i]], case, name)
        compare_fp32([lp[-1] for _, lp in answers[len(names)][i :: len(names)]], case, name)
    for i in range(len(load)):  # whatever was refused changed nothing
        for (_, before), (_, after) in zip(answers[0], answers[len(names) + 1 + i], strict=True):
            assert (before == after).all()
    return outcomes, log


def told(script: Path | str, *arguments: str, **env: str) -> dict:
    """What a child process prints after "@", as JSON. ``script`` is a file, or "-c" before code."""
    done = engine.launch(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **engine.SETTINGS, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    line = next((one for one in done.stdout.splitlines() if one.startswith("@")), None)
    assert line is not None, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(line[1:])
