"""Windows stay on the CPU and the model is elsewhere: torch's meta device stands for a GPU, and mixes as little."""

import pytest
import torch
from tiny import make_window, tiny_model

from infctx.borders import StatesConfig
from infctx.bptt import window_loss
from infctx.ops.planned import planned_kernels


@pytest.fixture
def autocast(monkeypatch):
    """It knows no meta device."""
    asked, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device != "meta" and asked(device))
    monkeypatch.setattr(
        torch, "autocast", lambda device, *a, **k: autocast("cpu" if device == "meta" else device, *a, **k)
    )


@pytest.mark.parametrize("states", ["all", "every-2"])
@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5", "rwkv6", "rwkv7", "rwkv7a"])
def test_windows_stay_on_the_host(autocast, arch, states):
    model = tiny_model(arch, torch.float32).to("meta")
    window = make_window(2, 4, 8, starts=((0, 0, 0), (0, 1, 3), (1, 2, 0)), padding=((1, 3, 5),))
    state = None
    with planned_kernels("cpu", 1):
        for _ in range(2):
            loss, metrics, state = window_loss(model, window, state, 3, states=StatesConfig(states))
            loss.backward()
    found = [loss, *metrics.values(), *(x for block in state.blocks for x in block)]
    found += [p.grad for p in model.parameters() if p.requires_grad]
    assert {x.device.type for x in found} == {"meta"}
