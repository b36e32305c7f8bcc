"""Writes the patches of a tree into a folder, for `git am` and `git apply`."""

from __future__ import annotations

from pathlib import Path

from vllm_moe_lora.patchset.change import refuse_changes, refuse_sources
from vllm_moe_lora.patchset.mail import mail
from vllm_moe_lora.patchset.tree import Refusal, Tree
from vllm_moe_lora.patchset.write import WriteError, replace_all

SERIES = "series"  # the file that names the patches in their order, one in each line


def files(tree: Tree) -> dict[str, str]:
    """Return the files of the series: name -> text."""
    found = {f"{patch.name}.patch": mail(patch) for patch in tree.patches}
    return {**found, SERIES: "".join(f"{name}\n" for name in found)}


def export(tree: Tree, out: Path, force: bool = False) -> None:
    """Write the series into the folder ``out``: all files of it, or none.

    The series is the same whether the patches are applied to the tree or not.

    Args:
        tree: the tree that the patches are for.
        out: a folder that is empty, or does not exist yet.
        force: whether ``out`` may contain something. A series there is replaced, patches that are
            only in the old one are removed, and other files stay.

    Raises:
        Refusal: the patches do not fit the tree, or ``out`` cannot be written or is not empty.
            Nothing is changed.
    """
    refuse_sources(tree)
    refuse_changes(tree)
    try:
        if out.exists() and not out.is_dir():
            raise Refusal(f"{out} is not a folder", "name a folder, or one that does not exist yet")
        if not force and out.is_dir() and any(out.iterdir()):
            raise Refusal(
                f"{out} is not empty",
                "name another folder, or use --force, which replaces a series there and leaves "
                "other files alone",
            )
        replace_all(out, {**_old_patches(out), **files(tree)})
    except (OSError, WriteError) as error:
        raise Refusal(
            f"nothing was changed, as a file cannot be written: {error}",
            "name a folder where you may write",
        ) from error


def _old_patches(out: Path) -> dict[str, None]:
    """Return the patches that the series in ``out`` names, each with None: to be removed."""
    series = out / SERIES
    names = series.read_text(errors="replace").split() if series.is_file() else []
    # Names only: a path could lead out of the folder.
    plain = [name for name in names if name.endswith(".patch") and Path(name).name == name]
    return {name: None for name in plain if (out / name).is_file()}
