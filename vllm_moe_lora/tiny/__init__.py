"""Tiny random MoE models and adapters, and the expected results for them.

`vllm-moe-lora demo` and the tests use them. `models` and `adapters` write checkpoints and adapters,
`quantise` makes INT4 versions, `engine` runs vLLM on them, and `oracle` computes the expected
log-probs with Hugging Face transformers in fp32, from weights with the adapter merged in. Nothing
is downloaded, and this process does not import vLLM.
"""
