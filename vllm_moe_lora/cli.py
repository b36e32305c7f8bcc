"""`vllm-moe-lora`: subcommands live in `vllm_moe_lora.commands`, one module each."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import vllm_moe_lora

# name -> one line of help. `vllm_moe_lora.commands.<name>` is imported only when it is used, and
# holds `add_arguments(parser)` and `run(args) -> exit code`.
COMMANDS = {
    "convert": "write an adapter in another layout, or merge it into a model",
    "demo": "build a tiny INT4 MoE model and show that adapter == merged on a real engine",
    "doctor": "check that the plugin is active here, or that adapters will load on a model",
    "inspect": "show what an adapter holds: layout, layers, experts, ranks, scales, bytes",
    "patches": "put LoRA on MoE models into a tree of vLLM itself, or take it out",
    "plan": "say which backend serves a model with adapters, and in how much memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0 fine, 1 trouble found, 2 usage."""
    args = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="vllm-moe-lora", description="LoRA on Mixture-of-Experts models in vLLM."
    )
    parser.add_argument("--version", action="version", version=vllm_moe_lora.__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((arg for arg in args if arg in COMMANDS), None)
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        if name == wanted:
            module = importlib.import_module(f"vllm_moe_lora.commands.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    parsed = parser.parse_args(args)
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
