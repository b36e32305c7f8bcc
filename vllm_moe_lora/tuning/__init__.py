"""`vllm-moe-lora tune`: checks and times the kernels for LoRA on experts on the user's own GPU.

cases.py makes layers and batches of the model's shapes, sides.py runs the kernels on them,
numbers.py compares with fp32, clock.py times, and session.py does one after the other. The result
is a record (records.py).
"""
