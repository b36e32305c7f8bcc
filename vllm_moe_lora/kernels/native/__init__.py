"""LoRA on the CPU as native code: one call where torch needs dozens of operators.

`vectors.py` has the innermost loops, `loops.py` what the kernels share, `dense.py` and `routed.py`
the kernels. `build.py` compiles them with numba and keeps the machine code on disk, `pool.py` runs
them on torch's own threads. `calls.py` is what other modules call; all of it is optional, and the
plain forms in kernels/cpu.py and kernels/cpu_dense.py define the result.
"""
