"""One tree of vLLM's files: where it is, which release, and how far it is patched."""

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
from vllm_moe_lora.patchset.series import HOME, Patch, SeriesError, hooks_of, pristine, series
from vllm_moe_lora.patchset.weave import IMPORT
from vllm_moe_lora.patchset.write import TEMPORARY
from vllm_moe_lora.sources import find, target_text

SHOWN = 12  # lines of a function that is not what it should be


class Refusal(Exception):
    """Nothing is done; `what` is in the way and `cure` gets it out of it."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(f"{what}. Cure: {cure}")
        self.what = what
        self.cure = cure


@dataclass
class Tree:
    """What `look` found.

    Attributes:
        root: the folder that holds ``vllm/``.
        release: whose patches it takes.
        how: how that is known.
        patches: in their order.
        done: how many of them are there; None where the files fit none of the steps.
        odd: the files that fit no step, with why; only where ``done`` is None.
        problems: hooked sources that are not the release's, as text.
    """

    root: Path
    release: str
    how: str
    patches: list[Patch]
    done: int | None = None
    odd: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def texts(self, count: int) -> dict[str, str | None]:
        """Every file that the patches touch -> its text after the first ``count``, or None."""
        found: dict[str, str | None] = {}
        for number, patch in enumerate(self.patches):
            for path, (before, after) in patch.files.items():
                found.setdefault(path, before)
                if number < count:
                    found[path] = after
        return found


def look(place: Path | None, release: str | None = None) -> Tree:
    """How a tree stands. Reads only.

    Args:
        place: the folder that holds ``vllm/``; None for the vLLM that Python would import.
        release: to be taken for, whatever the tree says of itself.

    Raises:
        Refusal: there is no vLLM, its release is unknown, or has no patches.
    """
    root = _locate(place)
    try:
        return _look(root, release)
    except OSError as error:
        raise Refusal(
            f"{error.filename} cannot be read: {error.strerror}", "read access"
        ) from error


def _look(root: Path, release: str | None) -> Tree:
    digests = _digests(root)
    number, how = _release(root, digests, release)
    try:
        patches = series(root, number)
    except SeriesError as error:
        patches, broken = [], f"vLLM {number} as it is there cannot be patched: {error}"
    else:
        broken = ""
    tree = Tree(root, number, how, patches, problems=_problems(root, number, digests))
    if broken and not tree.problems:
        raise Refusal(broken, "upgrade vllm-moe-lora, or take an untouched tree of that release")
    if patches:
        _stand(tree)
    return tree


def _locate(place: Path | None) -> Path:
    if place is None:
        spec = importlib.util.find_spec("vllm")  # imports nothing
        if spec is None or not spec.origin:
            raise Refusal("no vLLM is installed here", "name a tree with --tree DIR")
        place = Path(spec.origin).parents[1]
    root = place.resolve()
    if not (root / "vllm" / "lora" / "__init__.py").is_file():
        cure = "name the folder that holds vllm/: a checkout, or site-packages"
        if (root / "lora" / "__init__.py").is_file() and root.name == "vllm":
            cure = f"--tree {root.parent}"
        raise Refusal(f"{root} is no tree of vLLM: it has no vllm/lora/__init__.py", cure)
    return root


def _digests(root: Path) -> dict[str, str | None]:
    """Target of each hook -> digest of its source as upstream has it, None where it is not."""
    found: dict[str, str | None] = {}
    for hook in all_hooks():
        try:
            found[hook.target] = digest(target_text(root, hook.target, pristine))
        except (LookupError, SyntaxError, UnicodeError):
            found[hook.target] = None
    return found


def _fits(release: str, digests: Mapping[str, str | None]) -> bool:
    known = supported.hashes(release)
    hooks = [hook for hook in hooks_of(release) if hook.hashed]
    return all(digests[hook.target] in known.get(hook.target, ()) for hook in hooks)


def _release(root: Path, digests: Mapping[str, str | None], wanted: str | None) -> tuple[str, str]:
    """Which release the tree is, and how that is known. Raises Refusal."""
    known = list(supported.releases())
    names = ", ".join(known)
    if wanted is not None:
        if wanted not in known:
            raise Refusal(f"vLLM {wanted} is not a release it knows ({names})", "name one of them")
        return wanted, "as you say"
    said, by = _said(root)
    plain = supported.release_of(said)
    if plain in known:
        return plain, f"{by} says {said}"
    fitting = [release for release in known if _fits(release, digests)]
    if re.fullmatch(r"[0-9.]+", plain) and plain != "0.0.0":
        cure = "upgrade vllm-moe-lora" + (
            f", or --release {fitting[-1]}, whose sources it has" if fitting else ""
        )
        raise Refusal(f"{root} is vLLM {said} ({by}), not a release it knows ({names})", cure)
    if not fitting:
        raise Refusal(
            f"{root} does not say its release, and its sources are of none it knows ({names})",
            "--release X says what to take it for, and then shows what differs",
        )
    # Where several fit, their hooked sources are the same, and so are their patches.
    return fitting[-1], f"by its sources; {by} says {said}" if said else "by its sources"


def _said(root: Path) -> tuple[str, str]:
    """The version a tree gives itself and where, two empty texts where it does not."""
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
    """What git prints, None where there is no git or it fails. Takes no locks."""
    if shutil.which("git") is None:
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _problems(root: Path, release: str, digests: Mapping[str, str | None]) -> list[str]:
    """The hooked sources that are not the release's: file, line and what is there."""
    found, known = [], supported.hashes(release)
    for hook in hooks_of(release):
        have = digests[hook.target]
        if not hook.hashed or have in known.get(hook.target, ()):
            continue
        if have is None:
            found.append(f"{hook.target}: there is no such thing in this tree")
            continue
        spot = find(root, hook.target, pristine)
        lines = target_text(root, hook.target, pristine).splitlines()
        rest = [f"... {len(lines) - SHOWN} lines more"] if len(lines) > SHOWN else []
        text = "".join(f"\n      {line}" for line in [*lines[:SHOWN], *rest])
        path = spot.file.relative_to(root).as_posix()
        found.append(
            f"{path}:{spot.line}: {hook.target.partition(':')[2]} is not what vLLM {release} has "
            f"(hash {have}); this is what is there:{text}"
        )
    return found


def _stand(tree: Tree) -> None:
    """Fill in `done` and `odd`."""
    now: dict[str, str | None] = {}
    for path in tree.texts(0):
        file = tree.root / path
        now[path] = file.read_bytes().decode(errors="replace") if file.is_file() else None
    strange = _strange(tree.root, now)
    for count in range(len(tree.patches) + 1):
        if not strange and tree.texts(count) == now:
            tree.done = count
            return
    first, last = tree.texts(0), tree.texts(len(tree.patches))
    for path, text in now.items():
        if text == first[path] or text == last[path]:
            continue
        tree.odd.append(f"{path} is another than it makes")
    tree.odd += [f"{path} is none of this version's" for path in strange]
    if not tree.odd:
        # Each file is as it was or as it will be, but these do not go together.
        todo = [path for path, text in now.items() if text != last[path]]
        done = [path for path, text in now.items() if text != first[path]]
        some, what = min((todo, "not patched"), (done, "patched"), key=lambda one: len(one[0]))
        more = f" and {len(some) - SHOWN} more" if len(some) > SHOWN else ""
        tree.odd = [f"of {len(now)} files, {what} are {', '.join(some[:SHOWN])}{more}"]


def _strange(root: Path, now: Mapping[str, str | None]) -> list[str]:
    """Files with seams, or in our folder, that no patch of this version has."""
    found = [file for file in sorted((root / HOME).rglob("*")) if file.is_file()]
    if found or any(IMPORT in (text or "") for text in now.values()):
        # Somebody has patched it: where else?
        for file in sorted((root / "vllm").rglob("*.py")):
            if IMPORT in file.read_text(errors="replace"):
                found.append(file)
    paths = {
        file.relative_to(root).as_posix()
        for file in found
        if "__pycache__" not in file.parts and not file.name.endswith(TEMPORARY)
    }
    return sorted(paths - set(now))
