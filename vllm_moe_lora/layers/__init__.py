"""MoE layers that know LoRA: routed experts on CPU, and what holds shared experts and gates."""
