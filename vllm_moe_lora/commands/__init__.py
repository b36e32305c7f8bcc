"""The subcommands of `vllm-moe-lora`, one module each.

A module defines `add_arguments(parser)` and `run(args) -> exit code`; cli.py imports and calls it.
"""
