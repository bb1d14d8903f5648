"""The programs of docs/recipes.md run as they stand, from a checkpoint to samples that are measured."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from tokendrift import TokenDriftLoss
from tokendrift.demo import PRETRAINED
from tokendrift.models import load_denoiser

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
START, *RECIPES, END, OFFICIAL, DLLM = SECTIONS
QUIET = {
    '"gpt2-large"': repr(str(PRETRAINED / "judge")) + ", tokenizer.tokenizer",  # a judge that is here
    "max_epochs=1": 'max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False',
    '"runs",': '"runs", report_to=[], disable_tqdm=True, use_cpu=True,',
    "Accelerator()": "Accelerator(cpu=True)",
    "random_input=0": "random_input=0, pair_sequences=64",
    "take(64)": "take(16)",
    "max_steps=8": "max_steps=2",
    "save_steps=4": "save_steps=1",
    "steps=8, seed=0": "steps=2, seed=0",
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
    loops = ["A plain loop", "Lightning", "The Trainer of transformers", "Accelerate"]
    assert [*loops, "Objectives with hooks"] == RECIPES


# ------------------------------------------------------------------------------------- code of other repositories


class Diffusion(nn.Module):
    """What the recipe uses of the Lightning module of MDLM."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.backbone, self.tokenizer, self.ema = type(config)(config.config), tokenizer, SimpleNamespace()

    def forward(self, x, sigma):
        assert sigma.shape == (len(x), 1)
        return self.backbone(x, sigma[:, 0]).log_softmax(-1)

    def log(self, name, value, sync_dist):
        self.logged = {name: float(value)}


class MDLMTrainer:
    """What the recipe uses of the Trainer of dLLM."""

    time_epsilon, args, processing_class = 1e-3, SimpleNamespace(device="cpu"), SimpleNamespace(mask_token_id=1024)

    def scheduler(self, t):
        return 1 - t

    def _preprocess_inputs(self, inputs):
        return inputs

    def _postprocess_outputs(self, outputs):
        return outputs


@pytest.fixture
def refinement(monkeypatch):
    """Return a function that makes the class of a section, with stand-ins for the repository."""
    module = ModuleType("stand-in")
    module.Diffusion, module.MDLMTrainer = Diffusion, MDLMTrainer
    for name in ("diffusion", "dllm", "dllm.core", "dllm.core.trainers"):
        monkeypatch.setitem(sys.modules, name, module)

    def make(section):
        code = program(section).replace('"kuleshov-group/mdlm-owt"', repr(str(PRETRAINED / "masked")))
        exec(compile(code, section, "exec"), names := {})
        return names["Refinement"]

    return make


def test_the_official_code_trains_its_backbone_from_the_checkpoint(refinement):
    base, _ = load_denoiser(PRETRAINED / "masked")
    module = refinement(OFFICIAL)(base, "tokenizer")
    for one, other, average in zip(
        module.backbone.parameters(), base.parameters(), module.ema.shadow_params, strict=True
    ):
        assert torch.equal(one, other) and torch.equal(one, average)
    batch = {"input_ids": torch.randint(1024, (4, 32)), "attention_mask": torch.ones(4, 32, dtype=torch.int64)}
    loss = module.training_step(batch, 0)
    loss.backward()
    assert module.logged == {"trainer/loss": loss.item()} and not module.strict_loading
    assert module.backbone.output_layer.linear.weight.grad.abs().sum() > 0


def test_the_trainer_of_dllm_corrupts_neither_prompts_nor_padding(refinement):
    base, _ = load_denoiser(PRETRAINED / "masked")
    trainer, seen = refinement(DLLM)(drift=TokenDriftLoss.from_encoder(base)), []

    class Model(nn.Module):
        def forward(self, input_ids, attention_mask):
            seen.append(input_ids)
            return SimpleNamespace(logits=base(input_ids))

    ids = torch.randint(1024, (64, 32))
    labels, text = ids.clone(), torch.ones_like(ids)
    labels[:, :8], labels[:, 24:], text[:, 24:] = -100, -100, 0
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": text}
    loss, outputs = trainer.compute_loss(Model(), inputs, return_outputs=True)
    loss.backward()
    kept = seen[0] == ids
    assert kept[labels == -100].all() and not kept[labels != -100].all() and outputs.logits.shape == (64, 32, 1025)
    assert len(trainer.drift.queue_real) == 64
    trainer.compute_loss(Model().eval(), inputs)
    assert len(trainer.drift.queue_real) == 64 and not trainer.model_accepts_loss_kwargs
