"""Speed and peak memory of `prepare`: generated text as lines of JSON, prompts and completions, tokenised to disk.

    python benchmarks/prepare.py [--megabytes 500] [--tokenizer world] [--out benchmarks/results]

Documents of random words, lengths from 100 bytes to 1 MB (as many bytes in each decade), the first tenth of each the
prompt. Each kind of file is prepared in a process of its own, from a cold start; the peak is that of the process, and
`start` what it takes before it reads the first byte. MB are of text, without the JSON around it.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import record

KINDS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")


def texts(megabytes: float) -> list[str]:
    """Texts of random stretches of English, together of that size."""
    drawn, words, left, made = random.Random(0), "\n".join(topics.values()).split(" "), megabytes * 1e6, []
    while left > 0:
        size, begin = int(10 ** drawn.uniform(2, 6)), drawn.randrange(len(words))
        size = min(size, int(left) + 100)
        text = " ".join(words[begin : begin + size // 4])
        while len(text) < size:
            text += " " + " ".join(words[drawn.randrange(len(words)) :][: size // 4])
        made.append(text[:size])
        left -= size
    return made


def write(folder: Path, megabytes: float) -> tuple[int, int]:
    """The files to be read; returns how many documents and bytes of text each holds."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    made = texts(megabytes)
    table = pa.table({"prompt": [x[: len(x) // 10] for x in made], "completion": [x[len(x) // 10 :] for x in made]})
    parquet.write_table(table, folder / "a.parquet", row_group_size=100)
    csv.write_csv(table, folder / "a.csv")
    with (folder / "a.jsonl").open("w") as plain:
        for batch in table.to_batches(max_chunksize=100):
            plain.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    with (folder / "a.jsonl.gz").open("wb") as packed:
        subprocess.run(["gzip", "-1", "-c", str(folder / "a.jsonl")], stdout=packed, check=True)
    return len(made), sum(len(x.encode()) for x in made)


def one(file: str, tokenizer: str, out: str) -> None:
    """Prepare one file and print the figures, in a process of its own."""
    from infctx.documents import Source, prepare
    from infctx.tokenizer import load_tokenizer

    encoder = load_tokenizer(tokenizer)
    encoder.encode("what is built on first use")
    start, begin = peak(), time.perf_counter()
    documents = prepare(Source(file, "completion"), encoder, out)
    seconds = time.perf_counter() - begin
    tokens = int(documents.inputs.sum()) + len(documents)
    print(json.dumps({"seconds": seconds, "tokens": tokens, "start_MB": start, "peak_MB": peak()}))


def peak() -> float:
    """Megabytes that this process has held at most."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def main() -> None:
    """Measure each kind of file, print a line for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--tokenizer", default="world")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", nargs=2, metavar=("FILE", "OUT"), help="prepare this file only, in this process")
    options = parser.parse_args()
    if options.one:
        one(options.one[0], options.tokenizer, options.one[1])
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        documents, size = write(Path(folder), options.megabytes)
        print(f"{documents:,} documents, {size / 1e6:.1f} MB of text, tokenizer {options.tokenizer}")
        for kind in KINDS:
            command = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--one", f"{folder}/a{kind}"]
            done = subprocess.run([*command, f"{folder}/{kind}"], stdout=subprocess.PIPE, text=True, check=True)
            x = figures[kind] = json.loads(done.stdout.splitlines()[-1])
            x["MB_per_s"] = size / 1e6 / x["seconds"]
            print(f"  {kind:<10} {x['MB_per_s']:6.1f} MB/s  {x['tokens'] / 1e6 / x['seconds']:6.2f} Mtokens/s  "
                  f"peak {x['peak_MB']:.0f} MB, of which {x['start_MB']:.0f} before the first byte")  # fmt: skip
    facts = {"megabytes": size / 1e6, "documents": documents, "tokenizer": options.tokenizer}
    record.write(options.out / "prepare.json", **facts, kinds=figures)


if __name__ == "__main__":
    main()
