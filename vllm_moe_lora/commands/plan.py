"""`vllm-moe-lora plan`: will these adapters be served on this model, how, and in how much memory?

No weights are read: config.json, the headers of files, and vLLM's own choices (`probe`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_moe_lora.report import Finding, show

if TYPE_CHECKING:
    from vllm_moe_lora.probe import Answer

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of the model (no weights are read)")
    options(parser)


def options(parser: argparse.ArgumentParser) -> None:
    """What `doctor --model` takes too."""
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], help="folder of an adapter; repeat"
    )
    parser.add_argument(
        "--tensor-parallel-size", "-tp", type=int, action="append", help="default 1; repeat"
    )
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--max-loras", type=int, help="default: the number of adapters")
    parser.add_argument("--max-lora-rank", type=int, help="default: what the adapters need, or 16")
    parser.add_argument(
        "--lora-target-modules", nargs="+", help="as for vllm serve: what may have LoRA"
    )
    parser.add_argument("--memory", type=float, help="GiB of one device; default: of this machine")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    findings, command = report(args)
    return show(findings, command, args)


def report(args: argparse.Namespace) -> tuple[list[Finding], str | None]:
    """The findings, and the command to serve by (None where nothing can be served)."""
    from vllm_moe_lora.adapters import sizes
    from vllm_moe_lora.adapters.errors import AdapterError
    from vllm_moe_lora.adapters.offline import check

    try:
        sizes.text_config(args.model)
    except AdapterError as error:
        return [Finding(False, str(error), "name the folder of a model")], None
    findings, needed, lean = _adapters(args.model, args.adapter, args.lora_target_modules)
    rank = args.max_lora_rank or (check.smallest_rank(needed) if needed else 16)
    if needed > rank:
        what = f"an adapter has rank {needed}, above --max-lora-rank {rank}"
        findings.append(Finding(False, what, f"--max-lora-rank {check.smallest_rank(needed)}"))
    loras, worlds = args.max_loras or max(1, len(args.adapter)), args.tensor_parallel_size or [1]
    answers = {size: _ask(args, size, loras, rank, lean) for size in worlds}
    for size, answer in answers.items():
        findings += _device(args, size, answer, loras, rank, needed)
    if any(answer.error for answer in answers.values()):
        return findings, None
    parts = [f"vllm serve {args.model} --enable-lora --max-loras {loras} --max-lora-rank {rank}"]
    parts += [f"--tensor-parallel-size {worlds[0]}"] if worlds[0] > 1 else []
    parts += ["--enable-expert-parallel"] if args.enable_expert_parallel else []
    flag = args.lora_target_modules
    parts += [f"--lora-target-modules {' '.join(flag)}"] if flag else []
    parts += [f"--lora-modules {_modules(args.adapter)}"] if args.adapter else []
    return findings, " ".join(parts)


def _modules(adapters: Sequence[Path]) -> str:
    return " ".join(f"{path.name}={path}" for path in adapters)


def _adapters(
    model: Path, adapters: Sequence[Path], flag: Sequence[str] | None
) -> tuple[list[Finding], int, bool]:
    """Whether each will load, the highest rank of those that will, whether none has experts."""
    from vllm_moe_lora.adapters.errors import AdapterError
    from vllm_moe_lora.adapters.offline import check

    findings, rank, lean = [], 0, bool(adapters)
    for adapter in adapters:
        try:
            fit = check.fits(adapter, model)
            check.smallest_rank(fit.rank)
        except AdapterError as error:
            cure = "`vllm-moe-lora inspect` shows what it holds; see the README's layouts"
            findings.append(Finding(False, f"{adapter}: {error}", cure))
            lean = False
            continue
        rank, lean = max(rank, fit.rank), lean and not fit.layers
        if flag and fit.layers and not any("experts" in word.split(".") for word in flag):
            what = f"{adapter}: it has routed experts, which --lora-target-modules leaves out"
            findings.append(Finding(False, what, "add experts to --lora-target-modules"))
            continue
        layout = f"experts {', '.join(fit.layouts)} in {fit.layers} layers" if fit.layers else ""
        what = f"{adapter}: every tensor has a place; rank {fit.rank}; {layout or 'no experts'}"
        findings.append(Finding(True, what))
        findings += [Finding(True, f"{adapter}: {note}") for note in fit.notes]
    return findings, rank, lean


def _ask(args: argparse.Namespace, size: int, loras: int, rank: int, lean: bool) -> Answer:
    from vllm_moe_lora import probe

    flag = args.lora_target_modules
    question = probe.Question(
        str(args.model),
        size,
        args.enable_expert_parallel,
        max_loras=loras,
        max_lora_rank=rank,
        lora_target_modules=tuple(flag) if flag else None,
        no_experts=lean and not flag,
    )
    return probe.ask(question)


def _device(
    args: argparse.Namespace, size: int, found: Answer, loras: int, rank: int, needed: int
) -> list[Finding]:
    """Backend and memory of one device at one tensor parallel size."""
    from vllm_moe_lora.targets.supports_lora import IGNORING

    parallel = f"tensor parallel {size}" + (", experts too" if args.enable_expert_parallel else "")
    if found.error:
        cure = "the README's matrix has what runs where; without an engine here, ask where it is"
        return [Finding(False, f"{parallel}: vLLM refuses this model: {found.error}", cure)]
    findings = []
    for name, layers in found.backends.items():
        if not found.wrapped:
            why = (
                "--lora-target-modules leaves them out"
                if args.lora_target_modules
                else "as no adapter targets them, while the server can be given no others"
            )
            what = f"{parallel}: {layers} MoE layers by {name}: experts not wrapped, {why}"
            findings.append(Finding(True, what))
        elif found.takes_lora:
            findings.append(Finding(True, f"{parallel}: {layers} MoE layers by {name}: takes LoRA"))
        else:
            what = f"{parallel}: {layers} MoE layers by {name}: no LoRA on routed experts"
            why = IGNORING.get(name.rpartition(", ")[2], "another quantisation or backend")
            findings.append(Finding(False, what, why))
    if not found.backends:
        findings.append(Finding(True, f"{parallel}: no routed experts"))
    memory = args.memory * GIB if args.memory else found.memory
    free = memory * args.gpu_memory_utilization - found.weights
    slots = loras * found.slot
    what = (
        f"{parallel}: a slot of rank {rank} takes {found.slot / 2**20:,.1f} MiB of a device "
        f"({found.slot_experts / 2**20:,.1f} for routed experts), {loras} take "
        f"{slots / GIB:,.2f} GiB; weights {found.weights / GIB:,.2f} of {memory / GIB:,.1f} GiB"
    )
    if slots < free:
        left = f"; {(free - slots) / GIB:,.1f} GiB are left for the KV cache and activations"
        findings.append(Finding(True, what + left))
    else:
        findings.append(
            Finding(False, f"{what}: does not fit", _smaller(found.slot, free, rank, needed, size))
        )
    return findings


def _smaller(slot: int, free: float, rank: int, needed: int, size: int) -> str:
    """A setting that does fit into ``free`` bytes, where a slot of ``rank`` takes ``slot``."""
    from vllm_moe_lora.adapters.offline.check import RANKS

    if free > slot:
        return f"--max-loras {math.ceil(free / slot) - 1}"
    for smaller in sorted((r for r in RANKS if needed <= r < rank), reverse=True):
        if slot * smaller / rank < free:
            return f"--max-loras 1 --max-lora-rank {smaller}"
    return f"--tensor-parallel-size {2 * size}, or a quantised checkpoint"
