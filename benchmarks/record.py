"""Where figures go: a JSON file, or a Markdown table, with the commit and the machine they were measured at."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """The commit, the machine, and the versions of what the figures depend on."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = done.stdout.strip() or "unknown"
    except FileNotFoundError:
        commit = "unknown"
    found: dict[str, Any] = {"commit": commit, "machine": platform.machine(), "python": platform.python_version()}
    for name in ("torch", "triton", "fla-core"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def write(path: Path, **figures: Any) -> None:
    """Write figures to a file, with what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts(), **figures}, indent=1) + "\n")


def write_table(path: Path, lines: list[str], *remarks: str) -> None:
    """Write the lines of a Markdown table, under what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = ", ".join(f"{name} {value}" for name, value in facts().items())
    path.write_text("\n".join([head, *remarks, "", *lines]) + "\n")
