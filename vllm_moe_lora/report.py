"""The report that the commands `doctor` and `plan` print: a list of findings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass
class Finding:
    """One line of a report.

    Attributes:
        well: False if this is a problem. The commands then exit with 1.
        what: the sentence to print.
        cure: what the user can do about a problem; "" if there is nothing to do.
    """

    well: bool
    what: str
    cure: str = ""


def one_line(error: Exception) -> str:
    """Return the class of an error and its text, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def svg(parts: Iterable[str], width: float, height: float, font_size: int = 11) -> str:
    """Return a drawing.

    Args:
        parts: its elements, as SVG.
        width, height: in pixels.
        font_size: of its text, in pixels.
    """
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
    return f'{head} font-family="sans-serif" font-size="{font_size}">{"".join(parts)}</svg>\n'


def show(findings: list[Finding], command: str | None, args: argparse.Namespace) -> int:
    """Print a report.

    Args:
        findings: the lines of the report.
        command: a shell command to print below them, for example how to serve the model.
        args: the arguments of the command line; ``args.json`` asks for JSON.

    Returns:
        The exit code: 1 if a finding is a problem, else 0.
    """
    if args.json:
        out = {"findings": [asdict(found) for found in findings], "command": command}
        print(json.dumps(out, indent=1))
    else:
        for found in findings:
            cure = f"\n    cure: {found.cure}" if found.cure else ""
            print(f"{'✓' if found.well else '✗'} {found.what}{cure}")
        if command:
            print(f"\n{command}")
    return 0 if all(found.well for found in findings) else 1
