"""LoRA on routed experts with quantised weights, where vLLM fails or ignores the adapter.

- `select_experts.py` (vLLM 0.12 to 0.27) and `vllm_0_11.py`: which experts class runs a layer, with
  `marlin.py` and `weight_names.py`; and the error if there is none.
- `marlin_zero_points.py` (0.11.1 to 0.21): AWQ's zero points in Marlin.
- `unquantised_tokens.py` (0.20 to 0.23): FP8 and INT8 activations.
- `lora_context.py` (INT4, INT8) and `mxfp8.py`: experts whose `apply` ignores LoRA (0.20 to 0.33).
"""
