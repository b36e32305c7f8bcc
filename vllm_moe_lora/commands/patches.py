"""`vllm-moe-lora patches`: the plugin as patches to a tree of vLLM's files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_moe_lora.patchset.tree import Tree

ACTIONS = {
    "list": "print the patches of the tree's release, and which of them are applied",
    "check": "say whether they apply, or are applied already; nothing is written",
    "apply": "apply all of them, or none",
    "revert": "take them out again, which leaves no difference",
    "write": "write them into a folder, for git am and git apply",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "LoRA on MoE models as patches to vLLM's own files, without the plugin."
    _add_options(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        # Suppressed: the default here would overwrite what stands before the action.
        _add_options(action, default=argparse.SUPPRESS)
        if name == "write":
            action.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
            action.add_argument(
                "--force",
                action="store_true",
                help="replace a series that OUT contains; other files there stay",
            )


def _add_options(parser: argparse.ArgumentParser, **more: Any) -> None:
    """Add the options that all actions share."""
    parser.add_argument(
        "--tree",
        type=Path,
        metavar="DIR",
        help="folder that contains vllm/: a git checkout, an unpacked source tree or "
        "site-packages; default: where the installed vLLM is",
        **more,
    )
    parser.add_argument(
        "--release", metavar="X.Y.Z", help="take the tree for this vLLM, whatever it says", **more
    )
    parser.add_argument("--json", action="store_true", help="print JSON", **more)


def run(args: argparse.Namespace) -> int:
    """Carry out the action; return 1 if it was refused."""
    from vllm_moe_lora.patchset import tree as trees

    try:
        tree = trees.look(args.tree, args.release)
        said = _act(args, tree)
    except trees.Refusal as refused:
        if args.json:
            print(json.dumps({"error": refused.what, "cure": refused.cure}, indent=1))
        print(f"✗ {refused.what}\n    cure: {refused.cure}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({**_facts(tree), "said": said}, indent=1))
        return 0
    if args.action == "list":
        _table(tree)
    print(f"✓ {said}", file=sys.stderr if args.action == "list" else sys.stdout)
    return 0


def _act(args: argparse.Namespace, tree: Tree) -> str:
    """Carry out the action; return what was done. Raises Refusal."""
    from vllm_moe_lora.patchset import change, export

    action = args.action
    where = f"{tree.root}, vLLM {tree.release} ({tree.how})"
    if action == "list":
        return where
    if action == "write":
        export.export(tree, args.out, args.force)
        return f"{where}: {len(tree.patches)} patches and their series written to {args.out}"
    if action == "revert":
        files = change.revert(tree)
        return f"{where}: {f'reverted, {files} files' if files else 'nothing to revert'}"
    if action == "apply":
        files = change.apply(tree)
        if files:
            return f"{where}: {len(tree.patches)} patches applied to {files} files"
    change.refuse(tree)
    if tree.done == len(tree.patches):
        return f"{where}: already applied"
    return f"{where}: {len(tree.patches)} patches apply"


def _facts(tree: Tree) -> dict[str, Any]:
    from vllm_moe_lora.patchset.mail import subject

    return {
        "tree": str(tree.root),
        "release": tree.release,
        "applied": tree.done,
        "problems": tree.problems + tree.odd,
        "patches": [
            {
                "name": patch.name,
                "subject": subject(patch),
                "applied": tree.done is not None and number < tree.done,
                "files": sorted(patch.files),
                "hooks": [hook.target for hook in patch.hooks],
            }
            for number, patch in enumerate(tree.patches)
        ],
    }


def _table(tree: Tree) -> None:
    for number, patch in enumerate(_facts(tree)["patches"]):
        state = "?" if tree.done is None else ("+" if number < tree.done else "-")
        print(f"{state} {patch['name']:18} {len(patch['files']):3} files  {patch['subject']}")
    for text in tree.problems + tree.odd:
        print(f"✗ {text}")
