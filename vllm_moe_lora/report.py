"""What a report is made of, and how it is printed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass


@dataclass
class Finding:
    """One line of a report; ``cure`` where it is not well."""

    well: bool
    what: str
    cure: str = ""


def show(findings: list[Finding], command: str | None, args: argparse.Namespace) -> int:
    """Print a report, as JSON if ``args.json``; returns the exit code."""
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
