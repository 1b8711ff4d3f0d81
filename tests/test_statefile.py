"""States come back as they were; what is not a state of the model is refused."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import ARCHS, random_state, tiny_model, values

from infctx.state import select
from infctx.statefile import load_state, save_state


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", [1, 3])
def test_full_state(tmp_path, arch, rows):
    model = tiny_model(arch, torch.float32)
    state = random_state(model, rows)
    save_state(state, tmp_path / "deep" / "s.safetensors", {"turns": "3"})
    again, facts = load_state(tmp_path / "deep" / "s.safetensors", model)
    assert facts == {"turns": "3"}
    assert all(torch.equal(x, y) for x, y in zip(values(again), values(state), strict=True))
    tokens = torch.arange(rows * 5).view(rows, 5)
    assert torch.equal(model(tokens, again)[0], model(tokens, state)[0])


@pytest.mark.parametrize("arch", [x for x in ARCHS if x not in ("rwkv4", "goldfinch")])
def test_community_state(tmp_path, arch):
    model = tiny_model(arch, torch.float32)
    state = random_state(model, 1)
    save_state(state, tmp_path / "s.pth")
    names = torch.load(tmp_path / "s.pth", weights_only=True)
    assert {name: tuple(x.shape) for name, x in names.items()} == {
        f"blocks.{i}.att.time_state": (2, 16, 16) for i in range(2)
    }
    again, _ = load_state(tmp_path / "s.pth", model)
    for ours, theirs in zip(again.blocks, state.blocks):
        assert torch.equal(ours.wkv, theirs.wkv) and not ours.att_shift.any() and not ours.ffn_shift.any()
    torch.save({name: x.bfloat16() for name, x in names.items()}, tmp_path / "low.pth")
    assert load_state(tmp_path / "low.pth", model)[0].blocks[0].wkv.dtype == torch.float32


def test_states_without_a_beginning_of_their_own(tmp_path):
    """Layers of a fresh state share memory, which the format refuses."""
    model = tiny_model(dtype=torch.float32)
    save_state(model.initial_state(2), tmp_path / "s.safetensors")
    assert not any(x.any() for x in values(load_state(tmp_path / "s.safetensors", model)[0]))


@pytest.mark.parametrize(
    ("arch", "rows", "name", "message"),
    [
        ("rwkv4", 1, "s.pth", "RWKV-4 has no time_state"),
        ("goldfinch", 1, "s.pth", "cannot hold GoldFinch's memory"),
        ("rwkv7", 2, "s.pth", "holds one sequence"),
        ("rwkv7", 1, "s.txt", "end the name so"),
    ],
)
def test_states_that_a_file_cannot_hold(tmp_path, arch, rows, name, message):
    with pytest.raises(ValueError, match=message):
        save_state(random_state(tiny_model(arch), rows), tmp_path / name)


def test_files_that_are_no_state_of_the_model(tmp_path):
    model, other = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32, n_layer=3)
    smaller, path = tiny_model(dtype=torch.float32, head_size=8), tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError, match="no such state file"):
        load_state(path, model)
    path.write_text("<html>")
    with pytest.raises(ValueError, match="not a readable state file"):
        load_state(path, model)
    save_state(random_state(model, 1), path)
    with pytest.raises(ValueError, match="not a state of this model"):
        load_state(path, other)
    with pytest.raises(ValueError, match=r"blocks\.0\.wkv is"):
        load_state(path, smaller)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a state of this model"):
        load_state(path, model)
    save_state(random_state(model, 1), tmp_path / "s.pth")
    with pytest.raises(ValueError, match="time_state"):
        load_state(tmp_path / "s.pth", other)
    with pytest.raises(ValueError, match="time_state"):
        load_state(tmp_path / "s.pth", smaller)


def test_sequences_can_be_chosen():
    state = random_state(tiny_model("goldfinch"), 3)
    chosen = select(state, torch.tensor([2, 0, 2]))
    lengths = state.memory.cu_seqlens.diff()
    assert chosen.memory.cu_seqlens.diff().tolist() == [int(lengths[i]) for i in (2, 0, 2)]
    last = int(state.memory.cu_seqlens[2])
    assert torch.equal(chosen.memory.keys[: int(lengths[2])], state.memory.keys[last:])
    assert torch.equal(chosen.blocks[0].wkv, state.blocks[0].wkv[[2, 0, 2]])
