"""flash-linear-attention's kernels behind our backend, on the CPU: TRITON_INTERPRET=1 python tests/fla_interpreted.py

Prints the worst relative error of outputs, states and all gradients of each case, then the number of cases.
"""

import sys
import warnings

import torch
import triton
from fla.ops.rwkv6 import chunk_rwkv6  # noqa: F401 (imports its kernels)
from fla.ops.rwkv7 import chunk_rwkv7  # noqa: F401
from recurrences import OPS, PACKED, everything, expected, inputs
from tiny import worst

from infctx.ops import fla


class Counter(int):
    """A loop counter in a kernel, which the interpreter leaves a bare int."""

    def to(self, dtype):
        return self


def counters(*limits):
    return map(Counter, range(*map(int, limits)))


def modules():
    return [module for name, module in sys.modules.items() if name.startswith("fla.ops")]


def take_first_configurations():
    """Instead of the fastest: there is nothing to time in the interpreter, and each takes a second to compile."""
    for module in modules():
        for kernel in list(vars(module).values()):
            while isinstance(kernel, triton.KernelInterface):
                if isinstance(kernel, triton.runtime.Autotuner):
                    kernel.configs = kernel.configs[:1]
                kernel = getattr(kernel, "fn", None)


def mend_interpreter():
    """Loop counters with `to`, and `gather` where a module imported it by name."""
    for module in modules():
        module.range = counters
        if hasattr(module, "gather"):
            module.gather = lambda source, index, axis: triton.language.gather(source, index, axis)


def equal_keys(args):
    """What is written is overwritten again and again."""
    kk = torch.nn.functional.normalize(torch.ones_like(args[4]).float(), dim=-1).to(args[4])
    args[4], args[5] = (x.requires_grad_() for x in (-kk, kk.clone()))
    return args


CASES = {
    **{f"{t} tokens": (dict(b=2, t=t, n=32), {}) for t in (0, 1, 15, 17, 65, 130)},
    "packed": (dict(b=1, t=sum(PACKED), n=16, sequences=len(PACKED)), {"cu_seqlens": torch.tensor([0, *PACKED])}),
    "head size 128": (dict(b=1, t=20, n=128), {}),
    "decays near one": (dict(b=1, t=70, n=16, lowest=-1e-7), {}),
    "decays near zero": (dict(b=1, t=70, n=16, lowest=-16.0), {}),
    "no memory": (dict(b=1, t=70, n=16, lowest=-1e4), {}),
    "equal keys": (dict(b=1, t=64, n=32), {}),
}


def main():
    fla.missing = lambda device: None
    take_first_configurations()
    mend_interpreter()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count = 0
    for name in ("wkv6", "wkv7"):
        for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 5e-3)):
            for case, (sizes, options) in CASES.items():
                options = {x: y.cumsum(0) for x, y in options.items()}
                args = inputs(name, h=2, dtype=dtype, **sizes)
                if case == "equal keys" and name == "wkv7":
                    args = equal_keys(args)
                for i in fla.native.WIDE[name]:
                    args[i] = args[i].detach().float().requires_grad_()
                exact = [x.detach().double().requires_grad_() for x in args]
                error = worst(everything(OPS[name], args, backend="fla", **options), expected(name, exact, **options))
                print(f"{name} {dtype} {case}: {error:.1e}", flush=True)
                assert error < bound
                count += 1
    print(f"{count} cases")


if __name__ == "__main__":
    main()
