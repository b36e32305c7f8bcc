"""Apply the patches to a tree, or take them out: refuse first, then all at once."""

from __future__ import annotations

from vllm_moe_lora.patchset.series import HOME
from vllm_moe_lora.patchset.tree import Refusal, Tree, git
from vllm_moe_lora.patchset.write import WriteError, replace_all

FULL = 2
_RESTORE = "restore those files (git checkout, or reinstall vLLM)"


def apply(tree: Tree) -> int:
    """Put every patch in; returns how many files were written, 0 where all are there already.

    Raises:
        Refusal: why not; nothing is changed.
    """
    refuse(tree)
    return _change(tree, len(tree.patches))


def revert(tree: Tree) -> int:
    """Take out what is there of the patches, the first few or all; returns the number of files.

    Raises:
        Refusal: why not; nothing is changed.
    """
    if not tree.patches:
        _refuse_sources(tree)
    if tree.done is None:
        _refuse_mixture(tree)
    return _change(tree, 0)


def refuse(tree: Tree) -> None:
    """Raise Refusal where `apply` would, but for files that cannot be written."""
    _refuse_sources(tree)
    if tree.done is None:
        _refuse_mixture(tree)
    if tree.done == len(tree.patches):
        return
    if tree.done:
        names = ", ".join(patch.name for patch in tree.patches[: tree.done])
        raise Refusal(
            f"{tree.root} is half patched: {tree.done} of {len(tree.patches)} are there ({names})",
            f"vllm-moe-lora patches revert --tree {tree.root}",
        )
    touched = [path for path, text in tree.texts(0).items() if text is not None]
    dirty = git(tree.root, "status", "--porcelain", "--untracked-files=no", "--", *touched)
    if dirty:
        names = ", ".join(line[3:] for line in dirty.splitlines())
        raise Refusal(f"there are changes that git does not have: {names}", "commit or stash them")


def _refuse_sources(tree: Tree) -> None:
    if tree.problems:
        # The first in full, of the others only where they are.
        brief = [text.partition("\n")[0] for text in tree.problems[FULL:]]
        listed = "\n    ".join(tree.problems[:FULL] + brief)
        raise Refusal(
            f"the patches for vLLM {tree.release} ({tree.how}) do not apply:\n    {listed}\n    ",
            "an untouched tree of that release, or --release X if it is another",
        )


def _refuse_mixture(tree: Tree) -> None:
    listed = "\n    ".join(tree.odd)
    raise Refusal(
        f"{tree.root} is patched, but not as this version does it for vLLM {tree.release}:\n"
        f"    {listed}\n    ",
        f"revert with the version that patched it, or {_RESTORE} and remove {HOME}",
    )


def _change(tree: Tree, count: int) -> int:
    assert tree.done is not None
    now, then = tree.texts(tree.done), tree.texts(count)
    changes = {path: text for path, text in then.items() if text != now[path]}
    for path in changes:
        if (tree.root / path).is_symlink():
            raise Refusal(
                f"{tree.root / path} is a symbolic link into an installer's cache, or elsewhere",
                "install vLLM with copies of its files (uv: --link-mode=copy)",
            )
    try:
        replace_all(tree.root, changes)
    except WriteError as error:
        cure = "a user who may write there, or --tree with a copy of your own"
        raise Refusal(f"nothing is changed, since this cannot be written: {error}", cure) from error
    return len(changes)
