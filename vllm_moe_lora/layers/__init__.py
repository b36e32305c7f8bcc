"""LoRA on the layers of a MoE model: what the hooks call inside vLLM's layers and experts classes.

- `shared_experts/`: one LoRA layer for all names of a module (shared experts, gates).
- `cpu/`: LoRA on routed experts on the CPU backend.
- `quantised/`: INT4, FP8, MXFP8 and Marlin: names of weights, the experts class, zero points.
- `gpu/`: corrects wrong LoRA results of routed experts on GPUs (padding, interleaved gate and up,
  router weights on the input, triton_kernels, TRT-LLM), and runs our Triton kernels.
- `without_lora.py`: builds a layer's routed experts without LoRA if no adapter may target them.
"""
