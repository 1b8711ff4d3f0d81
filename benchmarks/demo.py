"""The main job on a real document: `make demo`.

Python's own documentation of its language (pydoc_data.topics, half a megabyte of English), taken as one document, read
twice by a small RWKV-7 with the exact gradient in each window; then its loss, its memory, and a sample of its text.
"""

import json
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from infctx.cli import main

TEXT, RUN = Path("data/tiny/topics.txt"), Path("runs/demo")


def unigram_entropy(text: bytes) -> float:
    """Nats per byte of the best model that knows only how often each byte occurs."""
    p = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def summary() -> None:
    """Print what the run should be judged by, and fail if it did not learn or did not stay in its memory."""
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    tail = [x["loss"] for x in lines[-len(lines) // 10 :]]
    loss, entropy = sum(tail) / len(tail), unigram_entropy(TEXT.read_bytes())
    early, late = lines[len(lines) // 10]["peak_memory_bytes"], lines[-1]["peak_memory_bytes"]
    print(f"loss {lines[0]['loss']:.3f} -> {loss:.3f} nats per byte; unigram entropy {entropy:.3f}")
    print(f"peak memory {early / 1e6:.0f} MB after a tenth of the run, {late / 1e6:.0f} MB at its end")
    print(f"{lines[-1]['tokens']:,} tokens in {lines[-1]['seconds']:.0f} s of training")
    print(f"run folder {RUN}, report {RUN / 'report.html'}")
    if loss > 0.75 * entropy or late > 1.1 * early:
        sys.exit("demo: the loss did not fall well below the unigram entropy, or memory grew")


if __name__ == "__main__":
    TEXT.parent.mkdir(parents=True, exist_ok=True)
    TEXT.write_text("\n\n".join(topics.values()), encoding="utf-8")
    shutil.rmtree(RUN, ignore_errors=True)
    main(["fit", "-c", "recipes/tiny.yaml", "--name", RUN.name])
    main(["export", str(RUN), str(RUN / "model.pth")])
    main(["generate", str(RUN / "model.pth"), "--prompt", "The import statement", "--max_tokens", "300",
          "--temperature", "0.7", "--top_p", "0.9"])  # fmt: skip
    summary()
