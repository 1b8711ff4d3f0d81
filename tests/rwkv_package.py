"""Runs the `rwkv` package on weight files: it chooses its class by the environment, so it needs a process of its own.

argv: file with questions, file for the answers; RWKV_V7_ON and RWKV_DE_VERSION are the caller's.
"""

import os
import sys

os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0")

import torch
from rwkv.model import RWKV

torch.set_num_threads(1)
quiet = {} if os.environ["RWKV_V7_ON"] == "1" else {"verbose": False}
answers = []
for question in torch.load(sys.argv[1], weights_only=True):
    model, results = RWKV(model=question["model"], strategy="cpu fp32", **quiet), {}
    for name, pieces in question["pieces"].items():
        state = [x.clone() for x in question["state"]] if question["state"] else None
        rows = []
        for piece in pieces:
            out, state = model.forward(piece, state, full_output=True)
            rows.append(out if out.dim() == 2 else out[None])
        results[name] = {"logits": torch.cat(rows), "state": list(state)}
    answers.append(results)
torch.save(answers, sys.argv[2])
