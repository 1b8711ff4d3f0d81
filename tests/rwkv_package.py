"""Runs the `rwkv` package on a weight file: it chooses its class by the environment, so it needs a process of its own.

argv: weight file without suffix, file with tokens and an initial state, file for the results.
"""

import os
import sys

os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")

import torch
from rwkv.model import RWKV

weights, question, answer = sys.argv[1:]
torch.set_num_threads(1)
q = torch.load(question, weights_only=True)
model = RWKV(model=weights, strategy="cpu fp32")
results = {}
for name, pieces in q["pieces"].items():
    state = [x.clone() for x in q["state"]] if q["state"] else None
    rows = []
    for piece in pieces:
        out, state = model.forward(piece, state, full_output=True)
        rows.append(out if out.dim() == 2 else out[None])
    results[name] = {"logits": torch.cat(rows), "state": list(state)}
torch.save(results, answer)
