"""LoRA on the CPU as native code: one call where torch needs dozens of operators.

`memory.py` reads and writes numbers, `vectors.py` has the innermost loops, `loops.py` what the
kernels share, `dense.py` and `routed.py` the kernels. `build.py` compiles them with numba and keeps
the machine code on disk, `pool.py` runs them on torch's own threads. Other modules call `calls.py`
and `pairs.py`. All of it is optional: kernels/cpu.py and kernels/cpu_dense.py do the same in torch.
"""
