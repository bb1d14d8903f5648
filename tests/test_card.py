"""The card says of a model what is true of it."""

from __future__ import annotations

import pytest

from tokendrift.training import make_config
from tokendrift.training.card import model_card
from tokendrift.training.few_step import judge_name

ROWS = [{"step": 0, "nfe": None, "sample_entropy": 2.0, "gen_ppl": 9.0}]


def card(judge=None, rows=(), **changes):
    options = {"checkpoint": "owner/name", "text": ("a.txt",), **changes}
    return model_card(make_config(values=options), rows, steps=3, process="masked", judge=judge)


def test_without_an_average_the_weights_are_the_last_ones():
    assert "moving average of the weights during training\n(decay 0.999)." in card()
    assert "The weights are those of the last step." in card(ema=0.0)
    assert "moving average" not in card(ema=0.0)


def test_a_local_path_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "base_model: owner/name" in card()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert "base_model" not in card()


def test_the_judge_is_named_whether_it_was_configured_or_passed():
    assert "no judge, so no Gen.-PPL" in card(rows=ROWS)
    assert "judge `mine`" in card("mine", ROWS)


@pytest.mark.parametrize(("judge", "name"), [(None, None), ("gpt2", "gpt2"), (len, "len"), (object(), "object")])
def test_a_judge_has_a_name(judge, name):
    assert judge_name(judge) == name
