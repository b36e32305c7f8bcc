"""Modules that a model reaches by several names: shared experts, router gates.

`aliases.py` points all names of a module at its one LoRA layer. `gates.py` replaces gates that are
torch.nn.Linear (up to vLLM 0.13), because vLLM has no LoRA layer for those.
"""
