"""What a run that goes on does otherwise than before, key by key."""

import math
from pathlib import Path
from typing import Any

import yaml

SECTIONS = ["model", "data", "trainer", "checkpoint", "states", "parallel"]


def changed(old: Any, new: Any, key: str = "") -> list[str]:
    """Each key of the sections that make a run, with what it was and is: key was -> is. A key left out counts as null.

    Args: old, new: recipes as YAML has them, or what they hold at `key`.
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{key} {_plain(old)} -> {_plain(new)}"]
    keys = list({**old, **new}) if key else SECTIONS
    return [x for k in keys for x in changed(old.get(k), new.get(k), f"{key}.{k}" if key else k)]


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def config_of(checkpoint: Path) -> Any:
    """The recipe of the run that a checkpoint is of; None if there is none."""
    try:
        return yaml.safe_load((checkpoint.absolute().parents[1] / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
