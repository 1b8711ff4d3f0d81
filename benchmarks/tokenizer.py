"""Encoding speed of the World tokenizer beside the `rwkv` package's trie and the bare Rust package, on one core.

    python benchmarks/tokenizer.py [--runs 5] [--out benchmarks/results]

Texts: Python's documentation of its language (pydoc_data.topics: English), and the sources of its standard library.
All implementations read the same text in turns, in one process held to one core; the ids must be equal. Only `infctx`
gives arrays, the others lists. Medians, and ratios to the trie.
"""

import argparse
import os
import statistics
import sysconfig
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import record
from pyrwkv_tokenizer import RWKVTokenizer
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from infctx.tokenizer import WorldTokenizer
from infctx.world import vocabulary_file

TRIE = "rwkv, trie"


def texts() -> dict[str, str]:
    """English, and source code."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return {
        "English": "\n\n".join(topics.values()),
        "Python": "\n".join(file.read_text("utf-8") for file in sources),
    }


def implementations() -> dict[str, Callable[[str], object]]:
    """Name to what turns a text into ids."""
    return {
        "infctx": WorldTokenizer().encode,
        "infctx, pure Python": WorldTokenizer(fast=False).encode,
        "pyrwkv-tokenizer": RWKVTokenizer().encode,
        TRIE: TRIE_TOKENIZER(str(vocabulary_file())).encode,
    }


def measure(text: str, runs: int) -> dict[str, dict[str, float]]:
    """Megabytes and millions of tokens a second, of each implementation. Raises: AssertionError if ids differ."""
    encoders = implementations()
    ids = {name: list(encode(text)) for name, encode in encoders.items()}  # also builds what is built on first use
    assert all(found == ids[TRIE] for found in ids.values()), "the ids differ"
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(runs):
        for name, encode in encoders.items():
            begin = time.perf_counter()
            encode(text)
            seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(x) for name, x in seconds.items()}
    return {
        name: {
            "MB_per_s": len(text.encode()) / 1e6 / median[name],
            "Mtokens_per_s": len(ids[TRIE]) / 1e6 / median[name],
            "slowest_MB_per_s": len(text.encode()) / 1e6 / max(seconds[name]),
            "times_trie": median[TRIE] / median[name],
        }
        for name in encoders
    }


def main() -> None:
    """Measure both texts, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results = {}
    for kind, text in texts().items():
        results[kind] = {"bytes": len(text.encode()), **measure(text, options.runs)}
        print(f"{kind}, {len(text.encode()) / 1e6:.2f} MB")
        for name, x in results[kind].items():
            if name != "bytes":
                print(f"  {name:<20} {x['MB_per_s']:6.1f} MB/s  {x['Mtokens_per_s']:6.2f} Mtokens/s  "
                      f"{x['times_trie']:5.1f} x the trie  slowest run {x['slowest_MB_per_s']:6.1f} MB/s")  # fmt: skip
    packages = {name: version(name) for name in ("rwkv", "pyrwkv-tokenizer", "numpy")}
    record.write(options.out / "tokenizer.json", packages=packages, runs=options.runs, texts=results)


if __name__ == "__main__":
    main()
