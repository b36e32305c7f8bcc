"""`vllm-moe-lora tune`: measures on this GPU which kernels are fastest for LoRA on experts.

It needs the model's config.json only: weights and adapters are random. First it checks the numbers
of each kind of kernels against fp32, then it times them, then it writes a record. With
VLLM_MOE_LORA_KERNELS=auto, the default, engines on this GPU use the record.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_moe_lora.report import one_line

if TYPE_CHECKING:
    from vllm_moe_lora.probe import Question
    from vllm_moe_lora.records import Conditions, LayerShape, Record
    from vllm_moe_lora.tuning.model_layers import ModelLayers
    from vllm_moe_lora.tuning.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of the model; no weights are read")
    parser.add_argument("--max-loras", type=int, default=1, help="as for vllm serve (default: 1)")
    parser.add_argument("--max-lora-rank", type=int, default=16, help="the same (default: 16)")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--dtype", default="auto", help="as for vllm serve (default: auto)")
    parser.add_argument(
        "--quantization",
        "--quant",
        "-q",
        help="as for vllm serve (default: what config.json says)",
    )
    parser.add_argument("--enable-mixed-moe-lora-format", action="store_true")
    parser.add_argument("--enable-moe-shared-loras", action="store_true")
    parser.add_argument("--minutes", type=float, default=20, help="most time (default: 20)")
    parser.add_argument("--out", type=Path, help="folder of the record; default: where auto looks")
    parser.add_argument("--report", type=Path, help="write a text to paste into an issue here")
    parser.add_argument("--plot", type=Path, help="draw the times here (SVG)")
    parser.add_argument("--force", action="store_true", help="overwrite --report and --plot")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="no GPU: tiny shapes in Triton's interpreter, invented times; shows that it runs",
    )


def run(args: argparse.Namespace) -> int:
    """Tune; return 0, 1 if a kind of kernels gave wrong numbers, 2 if this is not possible here."""
    for path in (args.report, args.plot):
        if path is not None and path.exists() and not args.force:
            print(f"tune: {path} exists; --force overwrites it", file=sys.stderr)
            return 2
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    else:
        import torch

        if not torch.cuda.is_available():
            why = f"torch {torch.__version__} sees no GPU"
            print(f"tune: {why}; run it on the machine that will serve. ", file=sys.stderr, end="")
            print("--interpret shows what it does, without times", file=sys.stderr)
            return 2
    question = _question(args)
    shapes, why = _shapes(args, question)
    if not shapes:
        print(f"tune: {why}", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * args.minutes
    sessions, stopped = [], False
    with ExitStack() as stack:
        layers, why = None, "they need a GPU"
        if not args.interpret and not all(base for _, base in shapes):
            layers, why = _build(question, stack)
        for number, (shape, base) in enumerate(shapes):
            left = (end - time.monotonic()) / (len(shapes) - number)
            session, stopped = _tune(args, shape, base, time.monotonic() + left, layers, why)
            sessions.append(session)
            if stopped:
                break
    return _finish(args, sessions, stopped)


def _question(args: argparse.Namespace) -> Question:
    from vllm_moe_lora import probe

    return probe.Question(
        str(args.model),
        args.tensor_parallel_size,
        args.enable_expert_parallel,
        max_loras=args.max_loras,
        max_lora_rank=args.max_lora_rank,
        dtype=args.dtype,
        quantization=args.quantization,
        enable_mixed_moe_lora_format=args.enable_mixed_moe_lora_format,
        enable_moe_shared_loras=args.enable_moe_shared_loras,
    )


def _shapes(
    args: argparse.Namespace, question: Question
) -> tuple[list[tuple[LayerShape, bool]], str]:
    """Ask vLLM for the distinct MoE layers of the model.

    Returns:
        (shape, whether the base GEMMs are vLLM's Triton ones without bias) of each, and why there
        are none.
    """
    from vllm_moe_lora import probe
    from vllm_moe_lora.records import LayerShape

    answer = probe.ask(question)
    if answer.error:
        return [], f"vLLM refuses this model: {answer.error}"
    found = []
    for one in answer.layers:
        shape = LayerShape(**{key: value for key, value in one.items() if key != "base"})
        # On a CPU other experts have this place.
        triton = args.interpret or shape.path.startswith("TritonExperts,")
        found.append((_tiny(shape) if args.interpret else shape, one["base"] and triton))
    return list(dict.fromkeys(found)), "the model has no routed experts with LoRA"


def _build(question: Question, stack: ExitStack) -> tuple[ModelLayers | None, str]:
    """Build the model without memory, for its layers; return None and why if this fails."""
    from vllm_moe_lora.tuning import model_layers

    try:
        return stack.enter_context(model_layers.built(question, "cuda")), ""
    except Exception as error:  # of any kind: vLLM's are many
        return None, one_line(error)[:500]


def _tiny(shape: LayerShape) -> LayerShape:
    """Return a small shape of the same kind, for the interpreter (which is exact in fp32 only)."""
    from dataclasses import replace

    few = replace(shape, experts=min(shape.experts, 4), top_k=min(shape.top_k, 2))
    few = replace(few, absent=min(shape.absent, 4))
    return replace(few, hidden=64, inner=32, slots=min(shape.slots, 3), rank=8, dtype="float32")


def _tune(
    args: argparse.Namespace,
    shape: LayerShape,
    base: bool,
    deadline: float,
    layers: ModelLayers | None,
    why: str,
) -> tuple[Session, bool]:
    """Check and time one shape, with a progress bar; Ctrl-C keeps what is done.

    Args:
        args: the command's.
        shape: what to tune for.
        base: whether unquantised weights and vLLM's Triton GEMMs are the base.
        deadline: `time.monotonic()` at which to stop.
        layers: vLLM's own; None if there are none.
        why: then, why not.

    Returns:
        The session, and whether it was stopped.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from vllm_moe_lora.tuning import clock, session

    console = Console(stderr=True)
    text = TextColumn("{task.description}", table_column=None)
    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), Remaining(), text)
    console.print(f"{shape}", highlight=False)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("random weights", total=1.0)

        def say(what: str, share: float) -> None:
            progress.update(task, completed=share, description=what)

        if args.interpret:
            sizes = {"checked": (1, 9), "sizes": (1, 2, 8)}
            kinds: dict[str, Any] = {"clock": clock.StubClock(), "on_gpu": False, **sizes}
        else:
            kinds = {"clock": clock.GraphClock()}
        base, more, remarks = _base_of(args, shape, base, layers, why)
        if "served" in more:  # its kernel may have padded the intermediate size
            shape = more["served"].shape
        made = session.Session(shape, _conditions(), say=say, base=base, **more, **kinds)
        made.remarks += remarks
        try:
            made.check()
            now = time.monotonic()
            made.search(now + (deadline - now) / 3)
            made.measure(deadline)
        except KeyboardInterrupt:
            made.remarks.append("stopped by the user")
            return made, True
        finally:
            made.free()
    return made, False


def _base_of(
    args: argparse.Namespace, shape: LayerShape, base: bool, layers: ModelLayers | None, why: str
) -> tuple[bool, dict[str, Any], list[str]]:
    """Decide what computes the base GEMMs of a layer. Arguments are those of `_tune`.

    Returns:
        Whether unquantised weights and vLLM's Triton GEMMs do, other fields of the session, and
        what to tell the user.
    """
    experts = shape.path.partition(",")[0]
    if base:
        if args.interpret or _fits(shape):
            return True, {}, []
        why = "the GPU has no memory for unquantised base weights"
        return False, {"tailless": why}, [f"{why}; LoRA is timed alone"]
    tailless = f"it computes base GEMMs of unquantised weights in Triton, not {experts}'"
    if layers is not None:
        try:
            served = layers.served(shape)
            inexact = f"{experts} quantise the tokens: only LoRA's numbers are compared with fp32"
            notes = [] if served.exact else [inexact]
            return False, {"served": served, "tailless": tailless}, notes
        except Exception as error:  # of any kind: the format is unknown, no memory, ...
            why = one_line(error)[:500]
    return False, {"tailless": tailless}, [f"{experts}' base GEMMs are left out: {why}"]


def _fits(shape: LayerShape) -> bool:
    """Return whether a layer's base weights fit twice into what is free on the GPU."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    rows = (shape.fused + 1) * shape.inner * shape.hidden
    return 2 * shape.experts * rows * getattr(torch, shape.dtype).itemsize < free


def _conditions() -> Conditions:
    import torch

    from vllm_moe_lora.kernels.triton.checks import arch_of
    from vllm_moe_lora.layers.gpu import choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose.conditions(arch_of(torch.device(device)))


def _finish(args: argparse.Namespace, sessions: Sequence[Session], stopped: bool) -> int:
    """Print the table, write records, report and plot; return the exit code."""
    from vllm_moe_lora import records
    from vllm_moe_lora.tuning import report

    made = [one.record() for one in sessions]
    text = "\n\n".join(
        report.text(session, record) for session, record in zip(sessions, made, strict=True)
    )
    print(text)
    # Invented times are kept only where the user says so.
    for record in made if args.out is not None or not args.interpret else ():
        if record is not None:
            print(f"record: {records.write(record, args.out)}", file=sys.stderr)
    if args.report is not None:
        args.report.write_text(text + "\n")
        print(f"report: {args.report}", file=sys.stderr)
    if args.plot is not None:
        whole: list[Record] = [record for record in made if record is not None]
        args.plot.write_text(report.svg(whole))
        print(f"plot: {args.plot}", file=sys.stderr)
    if stopped:
        print("stopped; what was measured until then counts", file=sys.stderr)
    return 1 if any(one.wrong for one in sessions) else 0
