"""The gaming guard on four ways to buy a low Gen.-PPL, on real text, and on text that it has no reason to flag."""

from __future__ import annotations

import functools
import json
import math
import pydoc_data.topics

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.corpus import prose
from tokendrift.demo import PRETRAINED
from tokendrift.evaluation import (
    GenerativePerplexity,
    SampleSet,
    character_features,
    check_samples,
    compare,
    evaluate,
    gradient_features,
    kernel_distance,
    measure,
)
from tokendrift.evaluation.guard import RULES
from tokendrift.models import load_denoiser
from tokendrift.models.tokenizer import decode
from tokendrift.sampling import SamplingSetting, denoiser_samples

COUNT = 128
EOS, LENGTH, JUDGE_WINDOW = 0, 32, 64  # of the shipped models


class World:
    """Real English in the demo's tokens, the shipped judge, and the text that a denoiser might have been trained on."""

    def __init__(self):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))
        topics = pydoc_data.topics.topics
        text = " ".join(paragraph for name in sorted(topics) for paragraph in prose(topics[name]))
        ids = torch.tensor(self.tokenizer.encode(text).ids)
        windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        self.windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
        self.real, self.held_out, self.training = self.windows.split([COUNT, COUNT, len(windows) - 2 * COUNT])
        self.judge = GenerativePerplexity(
            str(PRETRAINED / "judge"), self.tokenizer, max_length=JUDGE_WINDOW, eos_id=EOS
        )

    @functools.cached_property
    def rows(self):
        """Every cheat and held-out text, beside real text that is measured once."""
        sets = {cheat.__name__: cheat(self) for cheat, _ in CHEATS} | {"held_out": self.held_out}
        return evaluate(sets, self.judge, real=self.real, tokenizer=self.tokenizer, training=self.training)

    def row(self, ids, **options):
        options = {"real": self.real, "tokenizer": self.tokenizer, "training": self.training, **options}
        return evaluate({"samples": ids}, self.judge, **options)["samples"]


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("transformers")
    return World()


def repeating(world):
    """A phrase of eight tokens, over and over."""
    return world.training[:COUNT, :8].repeat(1, LENGTH // 8)


def frequent_words(world):
    """The thirty most frequent tokens, as often as they are, in any order."""
    counts, likely = world.training.flatten().bincount().topk(30)
    generator = torch.Generator().manual_seed(0)
    return likely[torch.multinomial(counts.double(), COUNT * LENGTH, True, generator=generator)].view(COUNT, LENGTH)


def copying(world):
    """Training text as it stands."""
    return world.training[:COUNT]


def cold(world):
    """The shipped masked model at temperature 0.5."""
    model, process = load_denoiser(PRETRAINED / "masked")
    return denoiser_samples(model, process, LENGTH, batch_size=COUNT)(SamplingSetting(8, temperature=0.5), COUNT)


CHEATS = [
    (repeating, {"sample_entropy", "repetition_4", "longest_repeat"}),
    (frequent_words, {"sample_entropy", "unigram_entropy", "distinct_1", "distinct_2", "most_frequent_share"}),
    (copying, {"copied_share"}),
    (cold, {"sample_entropy", "unigram_entropy", "distinct_2", "most_frequent_share"}),
]


@pytest.mark.parametrize(("cheat", "flagged"), CHEATS, ids=[cheat.__name__ for cheat, _ in CHEATS])
def test_every_cheat_is_flagged_with_figure_threshold_and_real_text(world, cheat, flagged):
    row = world.rows[cheat.__name__]
    assert flagged <= set(row.verdict.flags)
    assert not row.verdict.passed
    for finding in row.verdict.findings:
        if finding.level == "flag":
            order = [finding.value, finding.threshold, finding.real]
            assert order in (sorted(order), sorted(order, reverse=True)), finding
            for number in (finding.value, finding.threshold, finding.real):
                assert f"{number:.4g}" in str(finding)
    stored = json.loads(json.dumps(row.to_dict()))["guard"]
    assert {f["figure"] for f in stored["findings"] if f["level"] == "flag"} == set(row.verdict.flags)


def test_a_copier_is_told_apart_by_its_copies_alone(world):
    assert world.rows["copying"].verdict.flags == ("copied_share",)
    blind = world.row(copying(world), training=None).verdict
    assert blind.passed and "copied_share" in blind.unchecked


def test_held_out_text_is_not_flagged(world):
    verdict = world.rows["held_out"].verdict
    assert verdict.passed, verdict.findings
    assert verdict.unchecked == ()


@pytest.mark.slow
def test_an_honest_sample_of_a_model_passes_what_it_should(world):
    """At temperature 1 the small model writes worse than people, which is not what the guard is for."""
    model, process = load_denoiser(PRETRAINED / "masked")
    row = world.row(denoiser_samples(model, process, LENGTH, batch_size=COUNT)(SamplingSetting(16), COUNT))
    assert row.verdict.passed, row.verdict.findings
    assert row.comparison.verdict() == "higher"


def bigram_judge(ids):
    """Count pairs of neighbours: a judge that costs nothing."""
    size = int(ids.max()) + 1
    pairs = (ids[:, :-1] * size + ids[:, 1:]).flatten().bincount(minlength=size**2).view(size, size).float()
    table = (pairs + 0.1 * (ids.flatten().bincount(minlength=size) + 1) / ids.numel()).log()
    return GenerativePerplexity(lambda rows, mask: table[rows], protocol="all", max_length=LENGTH)


@pytest.fixture(scope="module")
def cheap(world):
    return bigram_judge(world.training)


def test_a_gen_ppl_below_real_text_never_passes_without_comment(world, cheap):
    """Real text ordered by how likely it is: the likelier half is below the other."""
    per_token = cheap.score(world.windows[: 2 * COUNT]).sample_nll
    likely, unlikely = (world.windows[part] for part in per_token.argsort().view(2, COUNT))
    figures = [measure(ids, cheap, resamples=200) for ids in (likely, unlikely)]
    assert "gen_ppl" in check_samples(*figures).flags
    assert "gen_ppl" not in check_samples(*reversed(figures)).flags
    same = [measure(world.windows[start::2][:COUNT], cheap, resamples=200) for start in (0, 1)]
    below, above = sorted(same, key=lambda m: m.gen_ppl.estimate)
    (comment,) = check_samples(below, above).findings
    assert (comment.figure, comment.level) == ("gen_ppl", "comment")
    assert "below real text within its variation" in str(comment)
    assert check_samples(above, below).findings == ()


def test_sets_of_different_size_are_judged_only_where_size_does_not_matter(world, cheap):
    few, many = (measure(world.windows[:n], cheap, resamples=50) for n in (40, 80))
    verdict = check_samples(few, many)
    assert [f.figure for f in verdict.findings if f.level == "comment" and f.figure != "gen_ppl"] == ["samples"]
    assert set(verdict.unchecked) == {c.figure for c in RULES if c.whole_set} | {"copied_share"}
    short = measure(world.windows[:80, :16], cheap, resamples=50)
    assert any(finding.figure == "length" for finding in check_samples(short, many).findings)


def test_the_guard_asks_for_figures_measured_alike(world, cheap):
    a, b = (measure(world.windows[:20], cheap, level=level, resamples=20) for level in (0.95, 0.9))
    with pytest.raises(TokenDriftError, match="were not measured in the same way: level"):
        check_samples(a, b)


def test_a_figure_whose_variation_is_not_known_is_unchecked_and_not_passed_over(cheap):
    """With one redraw nothing says how much a figure varies."""
    words, dull = torch.arange(480).view(20, 24), torch.ones(20, 24, dtype=torch.int64)
    flags = check_samples(*(measure(ids, cheap, resamples=20) for ids in (dull, words))).flags
    verdict = check_samples(*(measure(ids, cheap, resamples=1) for ids in (dull, words)))
    assert {"sample_entropy", "distinct_2", "repetition_4"} <= set(flags) <= set(verdict.unchecked)


def test_halves_without_an_n_gram_do_not_hide_the_others():
    """Two of many samples have 4 tokens, so many halves have no 4-gram at all."""
    judge = GenerativePerplexity(lambda ids, mask: torch.zeros(*ids.shape, 60), protocol="all")
    dull, real = [[1, 2, 3]] * 30 + [[1] * 40] * 2, [[1, 2, 3]] * 30 + [list(range(40)), list(range(10, 50))]
    a, b = (measure(samples, judge, resamples=100) for samples in (dull, real))
    assert math.isfinite(a.distinct_4.low) and "distinct_4" in check_samples(a, b).flags
    short = [measure(ids, judge, resamples=20) for ids in ([[1, 2], [3, 4]], [[1, 5], [3, 6]])]
    assert compare(*short).verdict("distinct_4") == "not distinguishable"


def test_ids_outside_the_judge_are_named(world):
    with pytest.raises(TokenDriftError, match="the judge's vocabulary V has 1024 entries"):
        evaluate({"samples": SampleSet(ids=[[1, 5000], [1, 2]])}, world.judge, real=world.real)


@pytest.mark.statistical
def test_real_text_beside_real_text_is_hardly_ever_flagged(world, cheap):
    """Windows are dealt at random to two hands, so the two have one law: any flag is a false alarm."""
    trials, alarms = 150, 0
    for seed in range(trials):
        order = torch.randperm(len(world.windows), generator=torch.Generator().manual_seed(seed))
        one, other, training = world.windows[order].split([COUNT, COUNT, len(order) - 2 * COUNT])
        figures = [measure(ids, cheap, training=training, resamples=200, seed=seed) for ids in (one, other)]
        alarms += not check_samples(*figures).passed
    # 13 one-sided figures beyond 3.5 standard errors: 0.3 % if they were normal and independent.
    assert alarms / trials <= 0.02


def tiled(world):
    """A short passage of each sample, over and over."""
    return world.held_out[:, :4].repeat(1, LENGTH // 4)


def shuffled(world):
    """The tokens of each sample in random order."""
    order = torch.rand(world.held_out.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return world.held_out.gather(1, order)


def repeated(world):
    """A quarter of the samples, each four times."""
    return world.held_out[: COUNT // 4].repeat(4, 1)


def truncated(world):
    """Rare tokens replaced: of the vocabulary the 200 most frequent tokens are left."""
    likely = world.training.flatten().bincount(minlength=1024).topk(200).indices
    rare = ~torch.isin(world.held_out, likely)
    others = likely[torch.randint(200, rare.shape, generator=torch.Generator().manual_seed(0))]
    return torch.where(rare, others, world.held_out)


def mixed(world):
    """The second half of each sample from another document."""
    half = LENGTH // 2
    return torch.cat([world.held_out[:, :half], world.held_out.roll(1, dims=0)[:, half:]], dim=1)


DISTINCT = {f"distinct_{n}" for n in (1, 2, 3, 4)}
REACTIONS = {  # the table in docs/results.md
    tiled: {"sample_entropy", "repetition_4", "longest_repeat", "unigram_entropy", *DISTINCT},
    shuffled: set(),
    repeated: {"duplicate_share", "self_bleu", "unigram_entropy", *DISTINCT},
    truncated: {"unigram_entropy", "distinct_1"},
    mixed: set(),
    copying: {"copied_share", "gen_ppl"},  # the judge knows the training text
}


ENERGY_REACTS = (tiled, shuffled, repeated, truncated)


@pytest.mark.parametrize("perturbation", REACTIONS, ids=[each.__name__ for each in REACTIONS])
def test_which_figures_react_to_which_perturbation_of_real_text(world, cheap, perturbation):
    """The perturbed text is compared with real text under a judge that knows pairs of neighbours alone."""
    options = {"training": list(world.training), "resamples": 200}
    verdict = check_samples(measure(perturbation(world), cheap, **options), measure(world.real, cheap, **options))
    assert set(verdict.flags) == REACTIONS[perturbation]


@pytest.mark.parametrize("perturbation", REACTIONS, ids=[each.__name__ for each in REACTIONS])
def test_which_perturbations_are_far_from_real_text_in_character_ngrams(world, perturbation):
    texts = [decode(world.tokenizer, ids.tolist()) for ids in (perturbation(world), world.real)]
    found = kernel_distance(*map(character_features, texts), kernel="energy", permutations=199, resamples=1)
    assert (found.z_score.estimate > 5) == (perturbation in ENERGY_REACTS)


GRADIENT_REACTS = (tiled, shuffled, repeated, truncated)


@pytest.fixture(scope="module")
def gradients_of_real(world):
    return gradient_features(world.real, world.judge)


@pytest.mark.parametrize(
    "perturbation",
    [pytest.param(each, marks=() if each is shuffled else pytest.mark.slow, id=each.__name__) for each in REACTIONS],
)
def test_which_perturbations_are_far_from_real_text_in_gradient(world, gradients_of_real, perturbation):
    """The judge is the small model that ships with the package, since one that knows pairs sees nothing in tiles."""
    features = gradient_features(perturbation(world), world.judge)
    found = kernel_distance(features, gradients_of_real, kernel="linear", permutations=199, resamples=1)
    assert (found.z_score.estimate > 5) == (perturbation in GRADIENT_REACTS), found
