"""Fits one loaded adapter to the model that vLLM serves, or refuses the adapter as a whole.

`read.py` turns tensors into vLLM's LoRAModel, `fit.py` matches its names to the model's modules,
`strict.py` checks that every tensor has a module and the right shape. `stage.py` builds the tensors
of routed experts that fit one slot of vLLM's LoRA layer, which `moe_layers.py` describes.
`explain.py` words the error if loading fails.
"""
