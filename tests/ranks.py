"""Runs a script as several ranks: processes of one thread each, which get their rank as the first argument."""

import os
import subprocess
import sys
from pathlib import Path


def run_ranks(script: str, ranks: int, logs: Path, *options: object, timeout: float = 300) -> None:
    """All of them must end well; else what they wrote last is the error."""
    command = [sys.executable, str(Path(__file__).with_name(script))]
    files = [(logs / f"rank-{rank}.log").open("w") for rank in range(ranks)]
    processes = [
        subprocess.Popen([*command, str(rank), *map(str, options)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                         stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        for rank, file in enumerate(files)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for file in files:
            file.close()
    assert not any(codes), "\n".join((logs / f"rank-{rank}.log").read_text()[-3000:] for rank in range(ranks))
