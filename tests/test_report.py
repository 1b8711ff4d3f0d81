"""The page of a run stands alone and shows what metrics.jsonl holds."""

import json
import re

import pytest

from infctx.report import write_report


def line(step):
    return {
        "step": step, "tokens": 100 * step, "documents": 1, "loss": 5.0 / step, "lr": 1e-3, "grad_norm": 1.0,
        "tokens_per_second": 1000.0 + step, "peak_memory_bytes": 5e8, "seconds": 0.1 * step,
        "position_loss": [[0, 5.0, 1], [3, 16.0, 8]],
    }  # fmt: skip


def make(folder, steps, **extra):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line(i)) + "\n" for i in range(1, steps + 1)))
    for name, text in extra.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_page(tmp_path, steps):
    make(tmp_path, steps, config_yaml="model: <b>", validation_jsonl='{"step": 1, "loss": 4.25}\n')
    page = write_report(tmp_path).read_text()
    assert page.count("<svg") == 2 and page.endswith("</html>")
    assert "4.2500" in page and "model: &lt;b&gt;" in page and f"{100 * steps:,}" in page
    outside = [x for x in re.findall(r'(?:src|href)="([^"#]+)', page) if not x.startswith("data:")]
    assert not outside and "<script" not in page


def test_without_a_step(tmp_path):
    with pytest.raises(ValueError, match="no step was made yet"):
        write_report(make(tmp_path, 0))
    with pytest.raises(FileNotFoundError, match="no run there"):
        write_report(tmp_path / "nowhere")
