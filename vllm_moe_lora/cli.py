"""The command `vllm-moe-lora`. Each subcommand is one module of `vllm_moe_lora.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import vllm_moe_lora

# Subcommand -> one line of help. The module `vllm_moe_lora.commands.<name>` defines
# `add_arguments(parser)` and `run(args) -> exit code`. It is imported only when it is used.
COMMANDS = {
    "convert": "write an adapter in another layout, or merge it into a model",
    "demo": "build a tiny INT4 MoE model and show that adapter == merged on a real engine",
    "doctor": "check that the plugin is active here, or that adapters will load on a model",
    "inspect": "show what an adapter holds: layout, layers, experts, ranks, scales, bytes",
    "patches": "put LoRA on MoE models into a tree of vLLM itself, or take it out",
    "plan": "say which backend serves a model with adapters, and in how much memory",
    "tune": "measure on this GPU which kernels compute LoRA on experts fastest",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 if all is well, 1 if the subcommand found a problem, 2 for wrong usage.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="vllm-moe-lora", description="LoRA on Mixture-of-Experts models in vLLM."
    )
    parser.add_argument("--version", action="version", version=vllm_moe_lora.__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((arg for arg in args if arg in COMMANDS), None)
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        if name == chosen:
            module = importlib.import_module(f"vllm_moe_lora.commands.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    parsed = parser.parse_args(args)
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
