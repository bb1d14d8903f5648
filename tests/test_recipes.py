"""The programs of docs/recipes.md run as they stand, from a checkpoint to samples that are measured."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from tokendrift.demo import PRETRAINED
from tokendrift.models import load_denoiser

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
START, *RECIPES, END = SECTIONS
QUIET = {
    '"gpt2-large"': repr(str(PRETRAINED / "judge")) + ", tokenizer.tokenizer",  # a judge that is here
    "max_epochs=1": 'max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False',
    '"runs",': '"runs", report_to=[], disable_tqdm=True, use_cpu=True,',
    "Accelerator()": "Accelerator(cpu=True)",
}


def program(section: str) -> str:
    """Return the code of a section, with what only tests need."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", SECTIONS[section], flags=re.DOTALL))
    for here, there in QUIET.items():
        code = code.replace(here, there)
    return code


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_saves_loads_samples_and_evaluates(recipe, tmp_path, monkeypatch, capsys):
    if recipe == "Lightning":
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PRETRAINED / "masked", "base")
    shutil.copy(PRETRAINED / "tokenizer.json", "base")
    Path("text.txt").write_text("\n".join(f"Line {i} returns the value {i * 7919 % 1000}." for i in range(400)))
    torch.manual_seed(0)
    exec(compile("\n".join(map(program, (START, recipe, END))), recipe, "exec"), {"__name__": "recipe"})
    before, after = (load_denoiser(folder)[0].vocab_embed.embedding for folder in ("base", "refined"))
    assert not torch.equal(before, after)
    assert re.search(r"^base: .*\nrefined: Gen.-PPL \d", capsys.readouterr().out, flags=re.MULTILINE)


def test_the_page_has_a_recipe_for_each_loop():
    assert RECIPES == ["A plain loop", "Lightning", "The Trainer of transformers", "Accelerate"]
