"""Engines of two real processes on the CPU, over gloo."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import layouts
from engine_cases import PROMPTS
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import engine, oracle

FILE = "adapter_model.safetensors"

PROCESSES = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    # A child's scripts import one another.
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    ),
}
FORKED = Path(__file__).with_name("forked.py")


def run(case, names, load=(), script=FORKED, said=(), **options):
    """Each name's batch of all prompts, then all of them in one batch; then ``load``.

    Args:
        names: of adapters; None is the base model.
        load: see `engine.Job`.
        script: see `engine.run`.
        said: what the log has to contain.
        options: of the engine.

    Returns:
        Log-probs after each prompt by name, alone and in the batch of all; the outcomes of
        ``load``; all answers.
    """
    rounds = [[(p, name) for p in PROMPTS] for name in names]
    rounds.append([(p, name) for p in PROMPTS for name in names])
    job = engine.Job(
        str(case.model),
        {name: str(path) for name, path in case.adapters.items() if any(names)},
        rounds,
        options={"tensor_parallel_size": 2, **options},
        load=list(load),
    )
    answers, outcomes, log = engine.run(job, PROCESSES, timeout=120, script=script)
    # Spawned workers each say so; forked ones have it from the process that did.
    if any(names) and os.environ.get("VLLM_MOE_LORA") != "0":  # as on patched trees
        assert log.count("vllm-moe-lora on vLLM") >= (1 if script == FORKED else 2)
    for text in said:
        assert text in log, log[-3000:]
    alone = {name: [lp[-1] for _, lp in answers[i]] for i, name in enumerate(names)}
    mixed = {
        name: [lp[-1] for _, lp in answers[len(names)][i :: len(names)]]
        for i, name in enumerate(names)
    }
    return alone, mixed, outcomes, answers


def add_3d_layouts(case, inner):
    """Give a case of gpt-oss an adapter in each of three layouts, with oracles."""
    tied, untied = (layouts.Truth(seed=i, tied=i == 1, inner=inner) for i in (1, 2))
    for name, truth, tensors in (
        ("flat", tied, layouts.flat(tied, interleaved=True)),
        ("per-expert", untied, layouts.per_expert(untied)),
        ("packed", tied, layouts.packed(tied, interleaved=True)),
    ):
        case.adapters[name] = layouts.save(case.folder / name, tensors, truth)
        merged = layouts.merge(case.plain, truth, case.folder / f"{name}-truth")
        case.oracles[name] = oracle.log_probs(merged, PROMPTS)


def without(case, name, missing):
    """A copy of an adapter without the tensors whose names ``missing`` accepts."""
    folder = case.folder / f"{name}-less"
    shutil.copytree(case.adapters[name], folder)
    tensors = load_file(folder / FILE)
    left = {k: t for k, t in tensors.items() if not missing(k)}
    assert len(left) < len(tensors)
    save_file(left, folder / FILE)
    return folder
