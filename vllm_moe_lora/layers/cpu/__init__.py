"""LoRA on routed experts on the CPU backend, where vLLM has none.

vLLM 0.30 to 0.33: `subclasses.py` chooses the experts class, `experts.py` is its common part,
`unquantized.py` (with `packing.py` and `columns.py`) and `int4.py` compute. Earlier:
`torch_experts.py`.
"""
