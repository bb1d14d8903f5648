"""Laws of temperature, top-k and nucleus."""

from __future__ import annotations

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.sampling import Shaping, shaping

FOUR = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()


def law(options, logits):
    return Shaping(**options)(logits).softmax(-1)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("nucleus", "key"), [("keep", "p"), ("drop", "p_drop_crossing")])
def test_both_nuclei_have_the_published_law(golden, index, nucleus, key):
    data = golden("transitions")
    top_p = data.params[f"nucleus.{index}"]["top_p"]
    data.assert_matches(law({"top_p": top_p, "nucleus": nucleus}, data["nucleus.log_p"]), f"nucleus.{index}.{key}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.6, "nucleus": "drop"}, [1, 0, 0, 0]),
        ({"top_p": 0.1}, [1, 0, 0, 0]),
        ({"top_p": 0.1, "nucleus": "drop"}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),  # the nucleus is that of what top-k leaves
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
    ],
)
def test_what_is_left_of_four_tokens(options, expected):
    torch.testing.assert_close(law(options, FOUR)[0], torch.tensor(expected).double(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("nucleus", ["keep", "drop"])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_does_not_depend_on_how_wide_it_is_looked_for(monkeypatch, nucleus, top_p):
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, 20)[:, None]
    whole = law({"top_p": top_p, "nucleus": nucleus}, logits)
    monkeypatch.setattr(shaping, "FIRST_WIDTH", 2)
    monkeypatch.setattr(shaping, "WIDTH_GROWTH", 3)
    assert torch.equal(whole, law({"top_p": top_p, "nucleus": nucleus}, logits))


def test_tokens_tied_with_the_last_of_the_top_k_stay():
    found = Shaping(top_k=2)(torch.tensor([[2.0, 1.0, 1.0, 0.0]]))
    assert found.tolist() == [[2.0, 1.0, 1.0, -torch.inf]]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_input_is_not_written_to_and_the_result_is_at_least_float32(options, dtype):
    logits = torch.randn(4, 9).to(dtype)
    before = logits.clone()
    assert Shaping(**options)(logits).dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number above 0"),
        ({"top_k": 0}, "top_k must be an integer of at least 1"),
        ({"top_p": 0.0}, "top_p must be a finite number above 0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]"),
        ({"nucleus": "upstream"}, "nucleus must be one of 'keep', 'drop'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(TokenDriftError, match=message):
        Shaping(**options)
