"""Imports go one way, Lightning stays where it belongs, and nothing is done at import."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "infctx"
LEVELS = [
    {"config", "world", "hf_tokenizer", "ops", "errors", "upstreamdata"},
    {"sizes", "upstream"},
    {
        "tokenizer",
        "huggingface",
        "layouts",
        "state",
        "segments",
        "loss",
        "sampling",
        "sources",
        "jsonstream",
        "binidx",
        "changes",
        "curves",
    },
    {"memory", "models", "refusals", "records", "templates", "arrowfile", "borders", "lanes", "loader"},
    {"formats"},
    {"documents", "tokentext"},
    {"task"},
    {"bptt"},
    {"parts"},
    {
        "optim",
        "checkpoint",
        "statefile",
        "generate",
        "parallel",
        "plots",
        "samplepage",
        "live",
        "evals",
        "devices",
        "ledger",
    },
    {"tuning", "report"},
    {"job"},
    {"costs"},
    {"engines"},
    {"plan"},
    {"plantext"},
    {"weights", "chat"},
    {"training", "data", "run", "snapshots", "stopping", "convert", "commands"},
    {"planning"},
    {"check", "preview"},
    {"verbs"},
    {"recipe"},
    {"cli"},
    {"__main__", "__init__"},
]
LIGHTNING = {
    "training",
    "data",
    "run",
    "snapshots",
    "stopping",
    "recipe",
    "verbs",
    "cut",
    "zero",
    "fsdp2",
    "launch",
    "watch",
}
# The package's own __init__ gathers the public names from these levels.
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules():
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 15
    return found


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {x.name for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module} | {f"{node.module}.{x.name}" for x in node.names}
    return names


def test_imports_go_one_way():
    for file in modules():
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "infctx" and len(parts) > 1 and parts[1] in LEVEL:
                assert LEVEL[parts[1]] <= LEVEL[own], f"{file.name} imports {name}"


def test_lightning_and_deepspeed_stay_at_the_top():
    for file in modules():
        tops = {name.split(".")[0] for name in imports(file)}
        assert "lightning" not in tops or file.stem in LIGHTNING, file
        assert "deepspeed" not in tops or file.stem == "zero", file


def test_import_is_light_and_silent():
    heavy = ("lightning", "datasets", "deepspeed", "matplotlib", "fla", "torch._dynamo")
    code = f"import sys, infctx; print([x for x in {heavy} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_modules_are_small():
    for file in modules():
        assert len(file.read_text().splitlines()) <= 320, file
