"""LoRA on routed experts on a GPU: corrections of wrong results, and our Triton kernels.

- Corrections: `padding.py` (padded intermediate size), `interleaved.py` (gpt-oss' gate and up),
  `router_weights_on_input.py` (Llama-4), `triton_kernels_experts.py` (gpt-oss' MXFP4), `trtllm.py`.
- Kernels: `moe_kernels.py` calls ours in place of Punica's. `base_product.py` lets them compute the
  base experts' GEMM and LoRA in one kernel (VLLM_MOE_LORA_KERNELS=tail).
"""
