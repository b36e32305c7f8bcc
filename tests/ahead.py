"""Compiles a Triton kernel for a GPU that is not here, and says what the machine code uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    text: str  # PTX, or AMD's assembly
    registers: int  # of a thread; on AMD those of vectors, accumulators included
    spilled: int  # bytes of a thread that did not fit into registers
    shared: int  # bytes of a block


def target(arch: str) -> GPUTarget:
    """Of sm_90, or of gfx942."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def build(
    kernel,
    arch: str,
    pointers: dict,
    constants: dict,
    divisible: bool = False,
    **options: int,
) -> Compiled:
    """Compile as the first launch would.

    Args:
        kernel: a `triton.jit` function.
        arch: such as sm_90, gfx942.
        pointers: element type of each tensor argument; all others are int32 or ``constants``.
        divisible: the int32 are multiples of 16, too, where the kernel specialises on that.
        options: of the launch.
    """
    names = [one.name for one in kernel.params]
    assert {*pointers, *constants} <= set(names)
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    # What a launch finds out: pointers are multiples of 16. Of the ints only where it is said.
    known = {*pointers, *(n for n in names if divisible and n not in constants)}
    aligned = {
        (one.num,): [["tt.divisibility", 16]]
        for one in kernel.params
        if one.name in known
        and not one.do_not_specialize
        and not one.do_not_specialize_on_alignment
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 3.9 on the default of fp fusion in 3.10
        compiled = triton.compile(source, target=target(arch), options=options)
    shared = compiled.metadata.shared
    if not arch.startswith("sm_"):
        text = compiled.asm["amdgcn"]
        # Spills of scalar registers go to lanes of vector registers, which are counted.
        return Compiled(
            text, _said(text, "vgpr_count"), 4 * _said(text, "vgpr_spill_count"), shared
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(compiled.asm["ptx"], int(registers), int(stack), shared)


def _said(assembly: str, name: str) -> int:
    """A number of the kernel's metadata in AMD's assembly."""
    return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))
