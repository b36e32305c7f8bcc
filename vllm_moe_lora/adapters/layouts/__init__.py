"""The layouts in which trainers write LoRA on routed experts, read and written.

`recognise.py` picks the reader for each layer from tensor names and shapes. `by_projection.py`
reads layouts whose names contain the projection (gate_proj, w1, ...), `peft_fused.py` reads PEFT's
fused experts. `write.py` turns the canonical form back into a layout, for the `convert` command.
"""
