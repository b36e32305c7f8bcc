"""Looks at a tree of vLLM's files: where it is, which release it is, which patches are applied.

A tree is a git checkout, an unpacked source archive, or the site-packages of an installed vLLM.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_moe_lora import supported
from vllm_moe_lora.hooks import all_hooks
from vllm_moe_lora.patching import digest
from vllm_moe_lora.patchset.series import (
    HOME,
    Patch,
    SeriesError,
    hooks_of,
    series,
    upstream_text,
)
from vllm_moe_lora.patchset.weave import IMPORT
from vllm_moe_lora.patchset.write import TEMPORARY
from vllm_moe_lora.sources import find, target_text

SHOWN = 12  # how many lines of a changed function, or names of files, a message shows


class Refusal(Exception):
    """The command was not carried out, and nothing was changed.

    Attributes:
        what: the reason.
        cure: what the user can do.
    """

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(f"{what}. Cure: {cure}")
        self.what = what
        self.cure = cure


@dataclass
class Tree:
    """What `look` found out.

    Attributes:
        root: the folder that contains ``vllm/``.
        release: the vLLM release of the tree.
        how: how the release was found, for messages.
        patches: the patches for this release, in their order.
        done: how many of them are applied, from the first on. None if the files are in no state
            that applying the patches one by one leads to.
        odd: if ``done`` is None: which files do not fit, and why.
        problems: the functions to patch that are not as in the release. One text each, with file,
            line and source.
    """

    root: Path
    release: str
    how: str
    patches: list[Patch]
    done: int | None = None
    odd: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def texts(self, count: int) -> dict[str, str | None]:
        """Return the text of all files that the patches change, after the first ``count`` patches.

        The text is None if the file does not exist then.
        """
        found: dict[str, str | None] = {}
        for number, patch in enumerate(self.patches):
            for path, (before, after) in patch.files.items():
                found.setdefault(path, before)
                if number < count:
                    found[path] = after
        return found


def look(place: Path | None, release: str | None = None) -> Tree:
    """Look at a tree, without changing it.

    Args:
        place: the folder that contains ``vllm/``. None for the vLLM that Python would import.
        release: the release to take the tree for. None to find out.

    Raises:
        Refusal: there is no vLLM, its release is not supported, or no patches can be made for it.
    """
    root = _locate(place)
    try:
        return _look(root, release)
    except OSError as error:
        raise Refusal(
            f"{error.filename} cannot be read: {error.strerror}",
            "run it as a user who may read the file",
        ) from error


def _look(root: Path, release: str | None) -> Tree:
    digests = _digests(root)
    number, how = _release(root, digests, release)
    try:
        patches = series(root, number)
    except SeriesError as error:
        patches, broken = [], f"this tree of vLLM {number} cannot be patched: {error}"
    else:
        broken = ""
    tree = Tree(root, number, how, patches, problems=_problems(root, number, digests))
    if broken and not tree.problems:
        raise Refusal(broken, "upgrade vllm-moe-lora, or use an unchanged tree of that release")
    if patches:
        _find_state(tree)
    return tree


def _locate(place: Path | None) -> Path:
    """Return the folder that contains ``vllm/``. Raises Refusal."""
    if place is None:
        spec = importlib.util.find_spec("vllm")  # imports nothing
        if spec is None or not spec.origin:
            raise Refusal("no vLLM is installed here", "name a tree with --tree DIR")
        place = Path(spec.origin).parents[1]
    root = place.resolve()
    if not (root / "vllm" / "lora" / "__init__.py").is_file():
        cure = "name the folder that contains vllm/: a checkout, or site-packages"
        if (root / "lora" / "__init__.py").is_file() and root.name == "vllm":
            cure = f"--tree {root.parent}"
        raise Refusal(f"{root} is not a tree of vLLM: it has no vllm/lora/__init__.py", cure)
    return root


def _digests(root: Path) -> dict[str, str | None]:
    """Return the target of each hook -> the digest of its source without seams; None if missing."""
    found: dict[str, str | None] = {}
    for hook in all_hooks():
        try:
            found[hook.target] = digest(target_text(root, hook.target, upstream_text))
        except (LookupError, SyntaxError, UnicodeError):
            found[hook.target] = None
    return found


def _fits(release: str, digests: Mapping[str, str | None]) -> bool:
    """Return whether all functions to patch are as in ``release``."""
    known = supported.hashes(release)
    hooks = [hook for hook in hooks_of(release) if hook.hashed]
    return all(digests[hook.target] in known.get(hook.target, ()) for hook in hooks)


def _release(root: Path, digests: Mapping[str, str | None], wanted: str | None) -> tuple[str, str]:
    """Find out which release the tree is.

    Args:
        root: the folder that contains ``vllm/``.
        digests: from `_digests`.
        wanted: the release that the user named, if any.

    Returns:
        The release, and how it was found.

    Raises:
        Refusal: the release is not supported, or cannot be found.
    """
    known = list(supported.releases())
    names = ", ".join(known)
    if wanted is not None:
        if wanted not in known:
            what = f"vLLM {wanted} is not a supported release (supported: {names})"
            raise Refusal(what, "name one of them")
        return wanted, "as --release says"
    version, source = _declared_version(root)
    plain = supported.release_of(version)
    if plain in known:
        return plain, f"{source} says {version}"
    fitting = [release for release in known if _fits(release, digests)]
    if re.fullmatch(r"[0-9.]+", plain) and plain != "0.0.0":
        cure = "upgrade vllm-moe-lora"
        if fitting:
            cure += f", or --release {fitting[-1]}, which has the same functions to patch"
        raise Refusal(
            f"{root} is vLLM {version} ({source}), which is not a supported release (supported: "
            f"{names})",
            cure,
        )
    if not fitting:
        raise Refusal(
            f"{root} does not say which release it is, and its functions are not those of a "
            f"supported release ({names})",
            "name the release with --release X; the command then shows what differs",
        )
    # If several releases fit, their functions to patch are the same, and so are their patches.
    how = "by its sources"
    return fitting[-1], f"{how}; {source} says {version}" if version else how


def _declared_version(root: Path) -> tuple[str, str]:
    """Return the version that a tree declares, and where; ("", "") if it declares none."""
    file = root / "vllm" / "_version.py"
    if file.is_file():
        text = file.read_text(errors="replace")
        if match := re.search(r"^__version__ = .*?['\"]([^'\"]+)['\"]", text, re.MULTILINE):
            return match[1], "vllm/_version.py"
    for record in sorted(root.glob("*.dist-info/RECORD")):
        if "\nvllm/__init__.py," in "\n" + record.read_text(errors="replace"):
            text = record.with_name("METADATA").read_text(errors="replace")
            if match := re.search(r"^Version: (\S+)", text, re.MULTILINE):
                return match[1], f"{record.parent.name}/METADATA"
    if (root / ".git").exists():
        done = git(root, "describe", "--tags", "--match", "v[0-9]*")
        if done is not None:
            return done.strip().removeprefix("v"), "git describe"
    return "", ""


def git(root: Path, *args: str) -> str | None:
    """Return what a git command prints; None if it fails or git is missing. It takes no locks."""
    if shutil.which("git") is None:
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _problems(root: Path, release: str, digests: Mapping[str, str | None]) -> list[str]:
    """Return a text for each function to patch that is not as in the release (`Tree.problems`)."""
    found, known = [], supported.hashes(release)
    for hook in hooks_of(release):
        have = digests[hook.target]
        if not hook.hashed or have in known.get(hook.target, ()):
            continue
        if have is None:
            found.append(f"{hook.target} does not exist in this tree")
            continue
        place = find(root, hook.target, upstream_text)
        lines = target_text(root, hook.target, upstream_text).splitlines()
        rest = [f"... {len(lines) - SHOWN} more lines"] if len(lines) > SHOWN else []
        text = "".join(f"\n      {line}" for line in [*lines[:SHOWN], *rest])
        path = place.file.relative_to(root).as_posix()
        found.append(
            f"{path}:{place.line}: {hook.target.partition(':')[2]} is not as in vLLM {release} "
            f"(hash {have}). This tree has:{text}"
        )
    return found


def _find_state(tree: Tree) -> None:
    """Set `Tree.done` and `Tree.odd`."""
    now: dict[str, str | None] = {}
    for path in tree.texts(0):
        file = tree.root / path
        now[path] = file.read_bytes().decode(errors="replace") if file.is_file() else None
    unknown = _unknown_files(tree.root, now)
    for count in range(len(tree.patches) + 1):
        if not unknown and tree.texts(count) == now:
            tree.done = count
            return
    first, last = tree.texts(0), tree.texts(len(tree.patches))
    for path, text in now.items():
        if text == first[path] or text == last[path]:
            continue
        tree.odd.append(f"{path} is neither unchanged nor as a patch makes it")
    tree.odd += [f"{path} is in none of this version's patches" for path in unknown]
    if not tree.odd:
        # Each file alone is as without or as with all patches, but not all are in the same state.
        todo = [path for path, text in now.items() if text != last[path]]
        done = [path for path, text in now.items() if text != first[path]]
        some, what = min((todo, "not patched"), (done, "patched"), key=lambda one: len(one[0]))
        more = f" and {len(some) - SHOWN} more" if len(some) > SHOWN else ""
        tree.odd = [f"of {len(now)} files, these are {what}: {', '.join(some[:SHOWN])}{more}"]


def _unknown_files(root: Path, now: Mapping[str, str | None]) -> list[str]:
    """Return the files that have seams, or are in `HOME`, but are in no patch of this version.

    Args:
        root: the folder that contains ``vllm/``.
        now: the files that are in a patch -> their text.
    """
    found = [file for file in sorted((root / HOME).rglob("*")) if file.is_file()]
    if found or any(IMPORT in (text or "") for text in now.values()):
        # The tree was patched, perhaps by another version. Look for seams in all files.
        for file in sorted((root / "vllm").rglob("*.py")):
            if IMPORT in file.read_text(errors="replace"):
                found.append(file)
    paths = {
        file.relative_to(root).as_posix()
        for file in found
        if "__pycache__" not in file.parts and not file.name.endswith(TEMPORARY)
    }
    return sorted(paths - set(now))
