"""The model that a run with adapters began with: its checkpoints hold what is trained, and say where the rest is."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from infctx.tuning.adapters import plain_name
from infctx.tuning.config import Tuning

SAMPLES = 4096  # numbers of each tensor that the fingerprint reads


def fingerprint(model: nn.Module) -> str:
    """Of names, shapes and numbers spread over every tensor, in float32."""
    total = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        flat = x.detach().flatten()
        total.update(f"{name} {tuple(x.shape)}".encode())
        total.update(flat[:: max(1, flat.numel() // SAMPLES)].float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


class Base:
    """Where frozen weights are read from, and which ones.

    Args:
        path: of the weights. model: as they are there. tuning: what the model will be given.
    """

    def __init__(self, path: str, model: nn.Module, tuning: Tuning) -> None:
        self.path, self.mark, self.tuning = str(Path(path).absolute()), fingerprint(model), tuning
        self.names = set(model.state_dict())

    def facts(self) -> dict[str, Any]:
        """For the manifest of a checkpoint."""
        return {"path": self.path, "fingerprint": self.mark, "tuning": asdict(self.tuning)}

    def require(self, facts: dict[str, Any] | None) -> None:
        """Raises: ValueError if a checkpoint was made from other weights."""
        if facts is None or facts["fingerprint"] != self.mark:
            raise ValueError(f"model.load {self.path}: the checkpoint was not tuned on these weights, but on "
                             f"{facts['path'] if facts else 'none'}")  # fmt: skip

    def left_out(self, model: nn.Module) -> set[str]:
        """Names, in the model's state, of what is frozen and as it was; pissa changes the weights that it is around."""
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        changed = ".base_layer." if self.tuning.method == "pissa" else "nothing"
        return {
            name for name in model.state_dict()
            if plain_name(name) in self.names and name not in trained and changed not in name
        }  # fmt: skip


def require_trained(model: nn.Module, names: set[str]) -> None:
    """Raises: ValueError if a checkpoint does not hold what the model trains, or holds something else."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if odd := sorted(trained - names) or sorted(names - set(model.state_dict())):
        raise ValueError(f"the checkpoint was made with another model.tuning: {odd[0]}")
