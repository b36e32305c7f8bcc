"""Tiny random MoE checkpoints, adapters, and the oracle that says what is right.

Used by `vllm-moe-lora demo` and by the tests. Nothing is downloaded and vLLM is not imported; the
oracle is Hugging Face transformers in fp32 with the adapter merged into the weights.
"""
