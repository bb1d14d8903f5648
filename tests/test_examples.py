"""Every example runs to its end; each checks its own promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
LONG = {"gallery"}  # half a minute
SHORTER = {
    "another_encoder": {"BASE_STEPS, DRIFT_STEPS = 32, 16, 40, 15": "BASE_STEPS, DRIFT_STEPS = 32, 16, 4, 4"},
    "plain_training_loop": {"BASE_STEPS, DRIFT_STEPS = 32, 16, 60, 20": "BASE_STEPS, DRIFT_STEPS = 32, 16, 12, 16"},
    "sample_and_measure": {"STEPS, SAMPLES = 95, 32, 16, 100, 128": "STEPS, SAMPLES = 95, 32, 16, 30, 64"},
}


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize(
    "script", [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in EXAMPLES]
)
def test_example_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    source = script.read_text(encoding="utf-8")
    for part, shorter in SHORTER.get(script.stem, {}).items():
        assert source.count(part) == 1
        source = source.replace(part, shorter)
    exec(compile(source, str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})
    assert capsys.readouterr().out.splitlines()[-1] == "ok"


def test_the_notebook_runs_and_is_stored_without_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("agg")
    pytest.importorskip("transformers")
    notebook = FOLDER / "quickstart.ipynb"
    assert notebook.stat().st_size < 30_000
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "notebook"}
    shorter = {
        "range(20)": "range(2)",
        "take(64)": "take(16)",
        "shape = (64,": "shape = (16,",
        "resamples=200": "resamples=20",
    }
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        for part in [part for part in shorter if part in source]:
            source = source.replace(part, shorter.pop(part))
        exec(compile(source, f"cell {number}", "exec"), names)
    assert not shorter  # each was found
    assert (tmp_path / "refined" / "config.json").is_file()
