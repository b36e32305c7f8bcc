"""Applies the patches to a tree of vLLM's files, and reverts them.

Everything is checked before the first file is changed.
"""

from __future__ import annotations

from vllm_moe_lora.patchset.series import HOME
from vllm_moe_lora.patchset.tree import Refusal, Tree, git
from vllm_moe_lora.patchset.write import WriteError, replace_all

SHOWN_IN_FULL = 2  # of several problems, how many are printed with the source text in question
_RESTORE = "restore those files (git checkout, or reinstall vLLM)"


def apply(tree: Tree) -> int:
    """Apply all patches.

    Returns:
        How many files were written: 0 if all patches are applied already.

    Raises:
        Refusal: the patches cannot be applied. Nothing is changed.
    """
    refuse(tree)
    return _write_state(tree, len(tree.patches))


def revert(tree: Tree) -> int:
    """Revert the patches that are applied: all of them, or only the first few.

    Returns:
        How many files were written or removed.

    Raises:
        Refusal: the patches cannot be reverted. Nothing is changed.
    """
    if not tree.patches:
        refuse_sources(tree)
    refuse_changes(tree)
    return _write_state(tree, 0)


def refuse(tree: Tree) -> None:
    """Check whether `apply` would work, without writing.

    Raises:
        Refusal: `apply` would raise it, too. (It may also fail because it cannot write a file.)
    """
    refuse_sources(tree)
    refuse_changes(tree)
    if tree.done == len(tree.patches):
        return
    if tree.done:
        names = ", ".join(patch.name for patch in tree.patches[: tree.done])
        raise Refusal(
            f"only {tree.done} of {len(tree.patches)} patches are applied to {tree.root} ({names})",
            f"vllm-moe-lora patches revert --tree {tree.root}, then apply them again",
        )
    touched = [path for path, text in tree.texts(0).items() if text is not None]
    dirty = git(tree.root, "status", "--porcelain", "--untracked-files=no", "--", *touched)
    if dirty:
        names = ", ".join(line[3:] for line in dirty.splitlines())
        raise Refusal(f"these files have uncommitted changes: {names}", "commit or stash them")


def refuse_sources(tree: Tree) -> None:
    """Raise Refusal if functions to patch are not as in the release."""
    if tree.problems:
        # Of the others only the first line, which says where they are.
        brief = [text.partition("\n")[0] for text in tree.problems[SHOWN_IN_FULL:]]
        listed = "\n    ".join(tree.problems[:SHOWN_IN_FULL] + brief)
        raise Refusal(
            f"the patches for vLLM {tree.release} ({tree.how}) do not apply:\n    {listed}\n    ",
            "use an unchanged tree of that release, or name its real release with --release X",
        )


def refuse_changes(tree: Tree) -> None:
    """Raise Refusal if files are neither unchanged nor as a patch makes them."""
    if tree.done is None:
        listed = "\n    ".join(tree.odd)
        raise Refusal(
            f"{tree.root} has changes that are not those of this version's patches for vLLM "
            f"{tree.release}:\n    {listed}\n    ",
            f"revert with the vllm-moe-lora that patched it, or {_RESTORE} and remove {HOME}",
        )


def _write_state(tree: Tree, count: int) -> int:
    """Write the files as they are with the first ``count`` patches; return how many changed."""
    assert tree.done is not None
    now, then = tree.texts(tree.done), tree.texts(count)
    changes = {path: text for path, text in then.items() if text != now[path]}
    for path in changes:
        if (tree.root / path).is_symlink():
            raise Refusal(
                f"{tree.root / path} is a symbolic link, perhaps into an installer's cache, so "
                "writing would change the file elsewhere",
                "install vLLM with copies of its files (uv: --link-mode=copy)",
            )
    try:
        replace_all(tree.root, changes)
    except WriteError as error:
        cure = "run it as a user who may write there, or copy the tree and use --tree"
        raise Refusal(f"nothing was changed, as a file cannot be written: {error}", cure) from error
    return len(changes)
