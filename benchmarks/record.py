"""Where figures go: a JSON file with the commit and the machine they were measured at."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any


def write(path: Path, **figures: Any) -> None:
    """Write figures to a file, with what they were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = {"commit": commit, "machine": platform.machine(), "python": platform.python_version()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, **figures}, indent=1) + "\n")
