"""What each strategy keeps on a rank: the costs of a step on one rank, cut up as the engines cut them.

P parameters, of which Q are trained, R ranks, e bytes of a weight while it is computed with. ddp is measured in
benchmarks/plan.py as the single rank is; what stands for DeepSpeed's and FSDP's own buffers are formulas.
"""

from collections import Counter
from typing import NamedTuple

from infctx.costs import Costs, Phases
from infctx.job import Job

GRADIENTS = ("gradients", "sums", "segment gradients")
BUCKET = 500_000_000  # numbers in DeepSpeed's reduce_bucket_size, as the overlays leave it
LIVE = 1_000_000_000  # stage3_max_live_parameters
HOST = ("masters", "optimizer")  # what --offload keeps in the host's memory


class Cut(NamedTuple):
    """A strategy: which of its tensors are in R pieces.

    Args:
        name: as in recipes/strategy. weights, gradients, moments: whether each of them is cut.
        engine: deepspeed keeps weights in bfloat16 under bf16-mixed, with float32 ones beside them. offload: moments
            and float32 weights lie on the host. note: --explain's formula of what the engine adds.
    """

    name: str
    weights: bool = False
    gradients: bool = False
    moments: bool = False
    engine: str = "torch"
    offload: bool = False
    note: str = ""


_ZERO = "a float32 copy of the weights 4 Q / R; one bucket of min(Q, 5e8) numbers of e bytes in the backward"
STRATEGIES = {
    x.name: x
    for x in (
        Cut("single"),
        Cut("ddp", note="buckets for all gradients, e Q"),
        Cut("zero1", moments=True, engine="deepspeed", note=_ZERO),
        Cut("zero2", gradients=True, moments=True, engine="deepspeed", note=_ZERO),
        Cut("zero2-offload", gradients=True, moments=True, engine="deepspeed", offload=True, note=_ZERO),
        Cut("zero3", True, True, True, "deepspeed", note=f"{_ZERO}; weights put together, e min(P, 1e9 + a layer)"),
        Cut("zero3-offload", True, True, True, "deepspeed", True, "as zero3; the pieces of the weights on the host"),
        Cut("fsdp2", True, True, True, note="two layers and the two largest matrices put together, e bytes each, "
            "and a layer's gradient in float32"),
    )
}  # fmt: skip


def computed_in(cut: Cut, precision: str) -> str:
    """The precision of the step that is measured for a strategy. Args: precision: the recipe's, as `Job` has it."""
    return "bf16" if precision == "bf16-mixed" and (cut.engine == "deepspeed" or cut.weights) else precision


def phases_on(cut: Cut, ranks: int, costs: Costs, job: Job) -> Phases:
    """Bytes by kind on one rank in each phase. Args: costs: of `job`, in the precision of `computed_in`."""
    e = 2 if job.precision == "bf16" else 4
    q = costs.trained
    made = {"window": _window, "backward": _backward, "step": _step}
    if cut.name == "single" or (cut.name == "ddp" and ranks == 1):
        found = {name: Counter(frame) for name, frame in costs.phases.items()}
    elif cut.name == "ddp":
        found = {name: Counter(frame) for name, frame in costs.phases.items()}
        for frame in found.values():
            frame["engine"] += e * q
    else:
        found = {name: f(cut, ranks, costs, e) for name, f in made.items()}
    for frame in found.values():
        if job.device == "cuda":
            frame["host"] = _take(frame, ("window", *(HOST if cut.offload else ())))
            frame["host"] += _take(frame, ("weights",)) if cut.offload and cut.weights else 0
            if job.states.offload == "cpu":
                row = 4 * job.lanes * costs.state
                frame["host"] += max(0, frame["borders"] - 2 * row)
                frame["borders"] = min(frame["borders"], 2 * row)
    return found


def _take(frame: Counter[str], kinds: tuple[str, ...]) -> int:
    return sum(frame.pop(kind, 0) for kind in kinds)


def _kept(cut: Cut, ranks: int, costs: Costs, e: int) -> Counter[str]:
    """What is there all the time."""
    q, shared = costs.trained, ranks if cut.weights else 1
    weight = 4 if cut.name == "fsdp2" else e
    frame = Counter(weights=weight * costs.parameters // shared, optimizer=8 * q // ranks)
    if cut.engine == "deepspeed":
        frame["masters"] = 4 * q // ranks
    if _whole_sums(cut, e):
        frame["gradients"] = 4 * q
    return frame


def _whole_sums(cut: Cut, e: int) -> bool:
    """DeepSpeed's ZeRO-1 for bfloat16 has room for all gradients in float32; the one for float32 cuts them up."""
    return cut.engine == "deepspeed" and not cut.gradients and e == 2


def _window(cut: Cut, ranks: int, costs: Costs, e: int) -> Counter[str]:
    frame, seen = _kept(cut, ranks, costs, e), costs.phases["window"]
    if not cut.weights:
        return frame + Counter({k: v for k, v in seen.items() if k not in ("weights", "gradients", "optimizer")})
    forward = costs.phases["forward"]
    frame += Counter({k: forward[k] for k in ("activations", "borders", "window", "other")})
    frame["logits"] = 3 * 4 * costs.tile
    frame["gradients"] = 4 * costs.trained // ranks
    if cut.name == "fsdp2":
        frame["engine"] = e * 2 * (costs.layer + costs.largest) + 4 * max(costs.layer, costs.largest)
    else:
        frame["engine"] = e * min(costs.parameters, LIVE + costs.layer) + e * min(BUCKET, costs.trained)
    return frame


def _backward(cut: Cut, ranks: int, costs: Costs, e: int) -> Counter[str]:
    """The handing over of a window's gradient, which only engines that keep weights whole have."""
    frame, seen = _kept(cut, ranks, costs, e), costs.phases["backward"]
    if cut.weights:
        return frame
    q = costs.trained
    frame += Counter({k: v for k, v in seen.items() if k not in ("weights", "optimizer")})
    frame["gradients"] += 0 if _whole_sums(cut, e) else 4 * q // ranks
    frame["engine"] = e * min(BUCKET, q)
    return frame


def _step(cut: Cut, ranks: int, costs: Costs, e: int) -> Counter[str]:
    frame, piece = _kept(cut, ranks, costs, e), 4 * costs.trained // ranks
    frame["gradients"] += 2 * piece  # as summed, and as the optimizer takes it
    frame["engine"] = 2 * piece  # the optimizer's intermediate values
    frame["window"] = costs.phases["step"]["window"]
    return frame


def peak(phases: Phases) -> tuple[str, Counter[str]]:
    """The phase that needs most of the device, and its bytes by kind."""
    name = max(phases, key=lambda x: phases[x].total() - phases[x]["host"])
    return name, phases[name]


def device_bytes(phases: Phases) -> int:
    """What of the peak lies on the device."""
    _, frame = peak(phases)
    return frame.total() - frame["host"]
