"""Unpacked vLLM releases, and running a script on one of them in a process of its own.

`ci/trees.py` fetches them. The scripts run in the environment of the tests, whichever release that
holds: its compiled operators are not used.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import forks
from packaging.version import Version
from release import installed

from vllm_moe_lora import supported
from vllm_moe_lora.sources import target_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Scripts that run Triton kernels in the interpreter, and from which release on.
INTERPRETED = {
    "kernels_in_place.py": "0.28",
    "oai_experts.py": "0.28",
    "paged_experts.py": "0.28",
    "trtllm_experts.py": "0.26",
    "tuned_layers.py": "0.28",
    "tuned_model.py": "0.28",
}
# What the scripts import by name.
CODE = [str(HERE / "scripts"), str(HERE / "stand_ins"), str(HERE.parent)]
FOLDER = Path(os.environ.get("MOE_LORA_TREES", ROOT / ".trees"))


@functools.cache
def available() -> list[str]:
    """The known releases whose sources are here."""
    return [release for release in supported.releases() if _tree(release) is not None]


def tree(release: str) -> Path:
    """The folder that holds ``vllm/`` of ``release``, one of `available`."""
    found = _tree(release)
    assert found is not None, f"no vLLM {release} in {FOLDER}: run ci/trees.py {release}"
    return found


def other(name: str) -> Path:
    """The folder of another unpacked package, such as verl-0.9.1; it may not be there."""
    return FOLDER / name


def _tree(release: str) -> Path | None:
    found = FOLDER / f"v{release}"
    if (found / "vllm" / "__init__.py").is_file():
        return found
    spec = importlib.util.find_spec("vllm")
    here = spec is not None and installed().partition("+")[0] == release
    return Path(spec.origin).parents[1] if here else None


def results(release: str, script: str, *arguments: str) -> dict[str, object]:
    """What a script of this folder prints as its last line, a JSON object, on ``release``."""
    more = {}
    if script in INTERPRETED and Version(release) >= Version(INTERPRETED[script]):
        more["TRITON_INTERPRET"] = "1"  # another import of the release than the other scripts'
    found = asked(str(tree(release)), script, *arguments, **more)
    assert isinstance(found, dict), f"{release}: {found}"
    assert found["release"] == release, "another vLLM was imported"
    return found


def environment(folder: str) -> dict[str, str]:
    """Of a process that imports the vLLM in ``folder``, and ours; the plugin acts when told to."""
    env = {**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_MOE_LORA": "0"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, str(ROOT), *CODE)))
    return env | {"OMP_NUM_THREADS": "1"}


@functools.cache  # a failure, too: each of its tests would wait for it again
def asked(folder: str, script: str, *arguments: str, **more: str) -> dict[str, object] | str:
    """The answer of the vLLM in ``folder``, "" for the installed one, or what is wrong.

    Args:
        more: environment.
    """
    env = environment(folder) | more
    try:
        done = forks.launch([sys.executable, str(HERE / "scripts" / script), *arguments], env, 600)
    except subprocess.TimeoutExpired as error:
        return str(error)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return f"{script} ended with {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(lines[-1])


def function(tree, target, **names):
    """A method of vLLM's, with ``names`` in place of its module's."""
    text = textwrap.dedent(target_text(tree, target))
    # Its annotations need not be there.
    exec(compile(f"from __future__ import annotations\n{text}", target, "exec"), names)
    return names[target.rpartition(".")[2]]
