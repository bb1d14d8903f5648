"""Sweeps and matched entropy, on models whose curves are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_dit

from tokendrift import TokenDriftError
from tokendrift.diffusion import MaskedDiffusion
from tokendrift.evaluation import (
    Frontier,
    GenerativePerplexity,
    Interval,
    Point,
    SampleSet,
    at_matched_entropy,
    matched_entropy,
    measure,
    ratio_at_entropy,
    sweep,
    temperature_at,
)
from tokendrift.sampling import SamplingSetting, denoiser_samples, sample, sample_set

V, LENGTH = 16, 24
LAW = torch.linspace(2.0, -2.0, V, dtype=torch.float64)  # logits of the judge and of a model that draws from its law


def judge_logits(ids, attention_mask=None):
    return LAW.expand(*ids.shape, V)


def drawer(logits, seed=0):
    """Draw tokens independently from a law; at temperature 1 the law itself."""

    def draw(setting, count):
        generator = torch.Generator().manual_seed(seed)
        law = (logits / setting.temperature).softmax(dim=-1)
        ids = torch.multinomial(law, count * LENGTH, replacement=True, generator=generator)
        return SampleSet(ids=ids.view(count, LENGTH).tolist(), nfe=setting.steps)

    return draw


JUDGE = GenerativePerplexity(judge_logits, protocol="all", max_length=LENGTH)


def figures(samples):
    return measure(samples, JUDGE, resamples=200)


@pytest.fixture(scope="module")
def frontier():
    settings = [SamplingSetting(4, t) for t in (1.5, 1.0, 0.7, 0.4)]
    models = {"the law": drawer(LAW), "flatter": drawer(LAW / 2, seed=1)}
    real = drawer(LAW, seed=9)(SamplingSetting(1), 200)
    return sweep(models, settings, figures, real=SampleSet(ids=real.ids), count=200)


def test_a_sweep_measures_every_model_at_every_setting(frontier):
    assert [(p.model, p.setting.temperature) for p in frontier.points] == [
        (model, t) for model in ("the law", "flatter") for t in (1.5, 1.0, 0.7, 0.4)
    ]
    assert all(p.measures.nfe == 4 and p.measures.samples == 200 for p in frontier.points)
    assert frontier.real.nfe is None
    assert [p.setting.temperature for p in frontier.curve("flatter", 4)] == [0.4, 0.7, 1.0, 1.5]


@pytest.mark.parametrize("kind", ["sample", "unigram"])
def test_at_the_entropy_of_real_text_the_law_itself_scores_like_real_text(frontier, kind):
    for model in ("the law", "flatter"):  # the flatter one at half its temperature is the law too
        found = frontier.at_entropy_of_real_text(model, 4, kind=kind)
        assert found.low < found.estimate < found.high
        # The curve between grid points is not straight: 0.7 to 1 spans a factor of 1.6.
        assert found.estimate == pytest.approx(frontier.real.gen_ppl.estimate, rel=0.05)


def test_an_entropy_out_of_reach_has_no_gen_ppl(frontier):
    hot = Frontier(tuple(p for p in frontier.points if p.setting.temperature > 1.2), frontier.real)
    assert hot.at_entropy_of_real_text("the law", 4) is None
    assert hot.to_dict()["at_entropy_of_real_text"][0]["gen_ppl"] is None


def test_real_text_of_a_sweep_is_cut_to_the_number_of_samples_and_spread(frontier):
    rows = [[token] * LENGTH for token in range(V)]
    found = sweep({"law": drawer(LAW)}, [SamplingSetting(4)], figures, real=rows, count=4)
    assert found.real.samples == 4
    every_fourth = figures([rows[0], rows[4], rows[8], rows[12]]).gen_ppl.estimate
    assert found.real.gen_ppl.estimate == pytest.approx(every_fourth, rel=0.5)  # of rows that span a factor of 55
    for real in (frontier.real, rows[:3]):
        with pytest.raises(TokenDriftError, match="samples and a point 4: the entropy of all tokens depends"):
            sweep({"law": drawer(LAW)}, [SamplingSetting(4)], figures, real=real, count=4)
    few = Frontier(frontier.points, figures(drawer(LAW)(SamplingSetting(1), 20)))
    with pytest.raises(TokenDriftError, match="real text has 20 samples and a point 200"):
        few.at_entropy_of_real_text("the law", 4)


def test_a_sweep_measures_real_text_as_its_points(frontier):
    other = measure(drawer(LAW)(SamplingSetting(1), 200), JUDGE, resamples=50)
    with pytest.raises(TokenDriftError, match="not measured in the same way: resamples is 200 for one and 50"):
        sweep({"law": drawer(LAW)}, [SamplingSetting(4)], figures, real=other, count=200)
    with pytest.raises(TokenDriftError, match="not measured in the same way"):
        Frontier(frontier.points, other).at_entropy_of_real_text("the law", 4)


def test_the_numbers_behind_the_plot_are_in_the_json(frontier):
    pytest.importorskip("matplotlib")
    plain = json.loads(json.dumps(frontier.to_dict()))
    for kind in ("sample", "unigram"):
        figure, axes = frontier.plot(kind)
        assert figure.axes == [axes]
        assert axes.get_xlabel().startswith(f"{kind} entropy (nats)") and axes.get_ylabel() == "Gen.-PPL"
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert sorted(labels) == ["flatter, 4 NFE", "real text", "the law, 4 NFE"]
        drawn = sorted(tuple(point) for line in axes.lines for point in line.get_xydata() if line.get_marker() == "o")
        stored = [(p[f"{kind}_entropy"]["estimate"], p["gen_ppl"]["estimate"]) for p in plain["points"]]
        assert drawn == sorted(stored)
    again = frontier.plot(axes=axes)
    assert again == (figure, axes)


@pytest.mark.parametrize("kind", ["sample", "unigram"])
def test_a_model_that_is_only_colder_is_no_better_at_matched_entropy(frontier, kind):
    colder = figures(drawer(LAW / 0.6, seed=3)(SamplingSetting(4), 200))
    usual = frontier.curve("the law", 4)[2].measures
    assert colder.gen_ppl.high < usual.gen_ppl.low  # it looks better
    found = at_matched_entropy(colder, drawer(LAW), figures, real=frontier.real, steps=4, kind=kind)
    assert found.verdict() == "not distinguishable" and found.matched
    assert found.temperature == pytest.approx(0.6, abs=0.05)
    assert not found.entropy_difference.excludes(0)
    assert found.ratio.low < 1 < found.ratio.high
    text = str(found)
    for part in (f"equal {kind} entropy", "not distinguishable", "4 NFE", "200 samples", "float64", "real text"):
        assert part in text
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["verdict"] == "not distinguishable" and plain["model"]["samples"] == 200


def test_a_model_that_is_better_at_the_same_entropy_is_called_so(frontier):
    wrong = LAW.flip(0)  # as varied, but against the judge's law
    good = frontier.curve("the law", 4)[2].measures
    found = at_matched_entropy(good, drawer(wrong), figures, real=frontier.real, steps=4)
    assert found.verdict() == "better" and found.ratio.high < 0.5
    bad = figures(drawer(wrong)(SamplingSetting(4), 200))
    assert at_matched_entropy(bad, drawer(LAW), figures, real=frontier.real, steps=4).verdict() == "worse"


def test_a_ratio_at_equal_entropy_is_one_for_the_same_law_and_none_out_of_reach(frontier):
    curve = [point.measures for point in frontier.curve("the law", 4)]
    between = figures(drawer(LAW, seed=4)(SamplingSetting(4, 0.85), 200))
    found = ratio_at_entropy(between, curve, figure="gen_ppl")
    assert found.low < 1 < found.high and found.estimate == pytest.approx(1, abs=0.05)
    # A permuted law has the same entropies and is less likely under the judge.
    wrong = figures(drawer(LAW.roll(1), seed=4)(SamplingSetting(4, 0.85), 200))
    expected = wrong.gen_ppl.estimate / between.gen_ppl.estimate * found.estimate
    assert ratio_at_entropy(wrong, curve[::-1], figure="gen_ppl").estimate == pytest.approx(expected, rel=0.02)
    assert ratio_at_entropy(curve[0], curve[1:]) is None


def test_sets_of_two_sizes_are_not_compared_at_equal_unigram_entropy(frontier):
    """The entropy of all tokens of a law grows with their number, so a smaller set looks colder than it is."""
    curve = [point.measures for point in frontier.curve("the law", 4)]
    few = figures(drawer(LAW, seed=4)(SamplingSetting(4, 0.85), 20))
    with pytest.raises(TokenDriftError, match="the sets have 20 and 200 samples"):
        ratio_at_entropy(few, curve, figure="gen_ppl", kind="unigram")
    with pytest.raises(TokenDriftError, match="the sets have 200 and 20 samples"):
        at_matched_entropy(curve[0], drawer(LAW), figures, real=frontier.real, steps=4, kind="unigram", count=20)
    assert ratio_at_entropy(few, curve, figure="gen_ppl").excludes(2.0)


def test_an_entropy_that_no_temperature_reaches_claims_nothing(frontier):
    flat = figures(drawer(LAW * 0)(SamplingSetting(4), 200))
    found = at_matched_entropy(flat, drawer(LAW), figures, real=frontier.real, steps=4)
    assert (found.matched, found.verdict(), found.temperature) == (False, "not matched", 1.0)


def test_few_samples_do_not_make_entropies_agree(frontier):
    """The interval of ten samples holds a difference that no comparison at equal entropy may have."""
    model, other = (figures(drawer(law, seed=s)(SamplingSetting(4), 10)) for law, s in ((LAW, 4), (LAW * 0.7, 13)))
    found = matched_entropy(model, other, other, kind="sample", temperature=0.7)
    assert not found.entropy_difference.excludes(0) and abs(found.entropy_difference.estimate) > 0.05
    assert not found.matched and found.verdict() == "not matched"


@pytest.mark.parametrize(
    ("left", "low", "high", "at_end", "matched"),
    [
        (0.01, -0.1, 0.1, False, True),
        (0.01, 0.005, 0.015, False, True),  # beyond chance, and of no consequence
        (0.04, -0.1, 0.2, False, True),
        (0.04, -0.1, 0.2, True, False),  # a better temperature may lie beyond the grid
        (0.04, 0.01, 0.07, False, False),
        (0.06, -0.1, 0.2, False, False),
        (-0.01, -0.1, 0.1, True, True),
    ],
)
def test_what_counts_as_matched(frontier, left, low, high, at_end, matched):
    real = frontier.real
    found = matched_entropy(real, real, real, kind="sample", temperature=1.0, at_end=at_end)
    assert found._replace(entropy_difference=Interval(left, low, high)).matched is matched


def test_an_end_of_the_grid_is_named_as_such(frontier):
    model = frontier.curve("the law", 4)[2].measures
    for temperatures, at_end in (((1.0, 0.7), False), ((0.7, 0.5), True), ((1.5, 1.2), True), ((1.5, 0.5), False)):
        found = at_matched_entropy(model, drawer(LAW), figures, real=frontier.real, steps=4, temperatures=temperatures)
        assert found.at_end is found.to_dict()["at_end"] is at_end


def test_a_known_curve_saves_the_grid(frontier):
    calls = []

    def counted(setting, count):
        calls.append(setting)
        return drawer(LAW)(setting, count)

    curve = [(1.0, 2.5), (0.5, 2.0)]
    model = frontier.points[1].measures
    at_matched_entropy(model, counted, figures, real=frontier.real, steps=4, curve=curve)
    assert calls == [SamplingSetting(4, temperature_at(curve, model.sample_entropy.estimate))]


def test_temperature_is_interpolated_and_held_at_the_ends():
    curve = [(1.0, 3.0), (0.5, 2.0), (0.8, 2.8)]
    assert temperature_at(curve, 2.9) == pytest.approx(0.9)
    assert temperature_at(curve, 2.4) == pytest.approx(0.65)
    assert temperature_at(curve, 3.5) == 1.0 and temperature_at(curve, 1.0) == 0.5


def test_a_denoiser_is_sampled_alike_whatever_the_batches():
    process = MaskedDiffusion(V + 1)
    denoiser = lambda x_t, sigma: torch.cat([LAW, LAW[:1]]).float().expand(*x_t.shape, V + 1)  # noqa: E731
    draws = [denoiser_samples(denoiser, process, 8, batch_size=size, seed=5) for size in (4, 10)]
    first, second = (draw(SamplingSetting(3, temperature=0.8), 10) for draw in draws)
    assert first.ids == second.ids and len(first) == 10
    assert first.nfe == 3 and dict(first.metadata) == {"steps": 3, "temperature": 0.8, "top_p": 1.0}
    nucleus = draws[0](SamplingSetting(3, top_p=0.2), 10)
    assert {token for row in nucleus.ids for token in row} == {0}  # the likeliest holds 0.22


def test_nfe_is_what_the_busiest_row_took_part_in_as_in_a_samples_file():
    """Each row of a masked batch skips the calls in which nothing of it moves; the batch skips hardly any."""
    model = make_dit()
    draw = denoiser_samples(model, MaskedDiffusion(13, mask_id=12), 8, seed=1)
    found = sample(model, MaskedDiffusion(13, mask_id=12), (4, 8), steps=32, seed=1)
    assert draw(SamplingSetting(32), 4).nfe == found.row_nfe.max() < found.nfe


def test_samples_are_drawn_without_dropout_and_the_mode_comes_back():
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x_t, sigma):
            return self.dropout(torch.cat([LAW, LAW[:1]]).float().expand(*x_t.shape, V + 1))

    model = Dropped().train()
    draw = denoiser_samples(model, MaskedDiffusion(V + 1), 8, seed=5)
    assert draw(SamplingSetting(3), 10).ids == draw(SamplingSetting(3), 10).ids
    assert model.training and model.dropout.training


def test_a_batch_holds_few_logits_at_once(monkeypatch):
    sizes = []

    def denoiser(x_t, sigma):
        sizes.append(len(x_t))
        return torch.zeros(*x_t.shape, V + 1)

    monkeypatch.setattr(sample_set, "LOGITS_AT_ONCE", 3 * 8 * (V + 1))
    denoiser_samples(denoiser, MaskedDiffusion(V + 1), 8)(SamplingSetting(1), 7)
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda f: sweep({}, [SamplingSetting(1)], figures, real=f.real, count=9),
            "at least one model and one setting",
        ),
        (lambda f: f.curve("other", 4), "no point of model 'other' with 4 steps"),
        (lambda f: f.at_entropy_of_real_text("the law", 4, kind="token"), "kind must be one of 'sample', 'unigram'"),
        (lambda f: at_matched_entropy(f.real, drawer(LAW), figures, real=f.real, steps=4, kind="x"), "kind must be"),
        (lambda f: at_matched_entropy(f.real, drawer(LAW), figures, real=f.real, steps=4, temperatures=[]), "is empty"),
    ],
)
def test_what_cannot_be_compared_is_named(frontier, call, says):
    with pytest.raises(TokenDriftError, match=says):
        call(frontier)


def test_points_of_one_curve_share_model_steps_and_nucleus(frontier):
    measures = frontier.points[0].measures
    points = [Point("a", SamplingSetting(4, t, p), measures) for p in (1.0, 0.9) for t in (1.0, 0.5)]
    curves = Frontier(tuple(points), frontier.real).curves()
    assert [[point.setting.top_p for point in curve] for curve in curves] == [[1.0, 1.0], [0.9, 0.9]]
    assert math.isfinite(measures.gen_ppl.estimate)
