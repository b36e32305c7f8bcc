"""Reads LoRA adapters as trainers write them and turns them into one canonical form.

Open `canonical.py` first: it defines that form, for one MoE layer of one adapter. `folder.py` reads
the files, `config.py` reads adapter_config.json, `names.py` and `spelling.py` read tensor names,
`group.py` assigns each tensor a place. `layouts/` has one file per family of layouts, `offline/`
is for the commands. Nothing here imports vLLM or Triton.
"""
