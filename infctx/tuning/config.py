"""What a recipe says of tuning."""

from dataclasses import dataclass, field
from typing import Any

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {  # a name -> peft's type, and what its configuration has set
    "lora": ("LORA", {}),
    "dora": ("LORA", {"use_dora": True}),
    "rslora": ("LORA", {"use_rslora": True}),
    "pissa": ("LORA", {"init_lora_weights": "pissa"}),
    **{name: (name.upper(), {}) for name in ("miss", "loha", "lokr", "hra", "delora", "randlora", "hira")},
}  # fmt: skip
METHODS = ("state", *PRESETS)
LAYERS = ("blocks.*.att.*", "blocks.*.ffn.*")


@dataclass(frozen=True)
class Tuning:
    """What is trained in place of all weights.

    Args:
        method: state: the state that every document begins with, of each layer's recurrence; or a method of the peft
            library: lora, dora, rslora, pissa, miss, loha, lokr, hra, delora, randlora, hira.
        lr: learning rate of what is tuned; null: that of the optimizer.
        rank: of adapters.
        alpha: of adapters, where the method has it; null: the rank.
        dropout: of adapters, where the method has it.
        targets: patterns of the linear layers that get an adapter: all in the layers, if left out.
        options: more of peft's configuration of the method.
        state_lr: beside an adapter, learn the initial state too, at this rate; null: do not.
        start: a state file to begin from: .safetensors, or .pth with time_state; null: zeros.
        shift: the last inputs that the token shifts begin with are learnt too; a .pth file cannot hold them.
    """

    method: str = "state"
    lr: float | None = None
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(LAYERS))
    options: dict[str, Any] = field(default_factory=dict)
    state_lr: float | None = None
    start: str | None = None
    shift: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"model.tuning.method {self.method} is not known; choose one of: {', '.join(METHODS)}")
        for key in ("lr", "state_lr", "rank"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"model.tuning.{key} must be above 0, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.tuning.dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.learns_state and (self.start is not None or self.shift):
            raise ValueError("model.tuning: start and shift are of a learnt state: give state_lr, or method state")
        if self.method == "state" and self.state_lr is not None:
            raise ValueError("model.tuning.state_lr is for a state beside an adapter: with method state give lr")

    @property
    def learns_state(self) -> bool:
        """Whether the initial state is learnt."""
        return self.method == "state" or self.state_lr is not None

    def require(self, in_pieces: bool) -> None:
        """Raises: ValueError for a state learnt where the weights are cut up over ranks."""
        if in_pieces and self.learns_state:
            raise ValueError("model.tuning: a state that is learnt needs whole weights: choose ddp, zero1 or zero2")

    @property
    def adapter(self) -> bool:
        """Whether layers get adapters."""
        return self.method != "state"
