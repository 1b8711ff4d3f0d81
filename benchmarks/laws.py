"""The worst error of each law, by architecture, in float64: runs the tests that hold them, and makes a table.

    python benchmarks/laws.py [--out benchmarks/results]

1 split, 2 step, 3 rows, 4 reset, 5 truncation (also none: the exact gradient of a window), 8 oracle (the tests' own
transcription of the papers). Errors are relative, of outputs, states and all gradients.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import record

LAWS = {1: "split", 2: "step", 3: "rows", 4: "reset", 5: "truncation", 8: "oracle"}
TESTS = "split_anywhere or rows_are or packed_documents or window_equals or float64_equals or of_the_transcription"


def measure() -> dict[str, dict[int, float]]:
    """Architecture -> law -> worst error over the tests' cases. Raises: SystemExit if a test fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/test_{name}.py" for name in ("models", "bptt", "oracle")]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-k", TESTS, f"--junitxml={report}", *files]
        if subprocess.run(command).returncode:
            sys.exit("laws: a test failed")
        worst: dict[str, dict[int, float]] = defaultdict(dict)
        for x in ElementTree.parse(report).iter("property"):
            if x.get("name") == "law":
                law, arch, error = (x.get("value") or "").split()
                worst[arch][int(law)] = max(worst[arch].get(int(law), 0.0), float(error))
    return dict(sorted(worst.items()))


def main() -> None:
    """Print the table as Markdown, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    worst = measure()
    print("| architecture | " + " | ".join(f"{law} {name}" for law, name in LAWS.items()) + " |")
    print("|---" * (len(LAWS) + 1) + "|")
    for arch, errors in worst.items():
        print(f"| {arch} | " + " | ".join(f"{errors[law]:.1e}" for law in LAWS) + " |")
    record.write(options.out / "laws.json", laws=LAWS, worst=worst)


if __name__ == "__main__":
    main()
