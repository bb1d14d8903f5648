"""The Markov language against enumeration of all its sequences, and what its measures see."""

from __future__ import annotations

import io
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.diffusion import LogLinear, MaskedDiffusion, UniformDiffusion
from tokendrift.markov import ExactDenoiser, MarkovLanguage, few_step, measure_ids, real_floor
from tokendrift.models import DiT, DiTConfig
from tokendrift.sampling import FirstHitting
from tokendrift.training import Continuation, Denoising, LoopConfig, train

TINY = MarkovLanguage.random(words=3, successors=2, length=4, seed=1)
SMALL = MarkovLanguage.random(words=6, successors=2, length=5, seed=0)


def enumerated(language):
    """All sequences (V^L, L) and their probabilities, multiplied up one by one."""
    sequences = torch.tensor(list(itertools.product(range(language.words), repeat=language.length)))
    chances = []
    for sequence in sequences.tolist():
        chance = language.stationary[sequence[0]].item()
        for a, b in itertools.pairwise(sequence):
            chance *= language.transitions[a, b].item()
        chances.append(chance)
    return sequences, torch.tensor(chances, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the language


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 10_000))
def test_a_random_language_has_its_successors_and_a_law_that_stays(words, successors, seed):
    successors = min(successors, words)
    language = MarkovLanguage.random(words, successors, seed=seed)
    assert (language.allowed.sum(dim=1) == successors).all()
    torch.testing.assert_close(language.stationary @ language.transitions, language.stationary, atol=1e-12, rtol=0)
    assert (language.stationary > 0).all() and language.stationary.sum().item() == pytest.approx(1, abs=1e-12)
    assert torch.equal(language.transitions, MarkovLanguage.random(words, successors, seed=seed).transitions)


def test_entropies_and_probabilities_are_those_of_the_enumeration():
    sequences, chances = enumerated(TINY)
    assert chances.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(TINY.log_prob(sequences).exp(), chances, atol=1e-15, rtol=1e-12)
    assert torch.special.entr(chances).sum().item() / TINY.length == pytest.approx(TINY.entropy, abs=1e-12)
    for position in range(TINY.length):
        word = torch.zeros(3, dtype=torch.float64).index_add_(0, sequences[:, position], chances)
        torch.testing.assert_close(word, TINY.stationary, atol=1e-12, rtol=0)
        assert torch.special.entr(word).sum().item() == pytest.approx(TINY.unigram_entropy, abs=1e-12)


def test_the_default_language_is_the_one_that_was_written_down():
    language = MarkovLanguage.random()
    assert (language.words, language.length) == (48, 16)
    assert language.unigram_entropy == pytest.approx(3.63562, abs=1e-5)
    assert language.conditional_entropy == pytest.approx(1.11825, abs=1e-5)


def test_real_text_follows_the_enumerated_law():
    n = 20_000
    sequences, chances = enumerated(TINY)
    ids, code = TINY.sample(n, seed=0), torch.tensor([27, 9, 3, 1])
    found = torch.bincount((ids * code).sum(dim=1), minlength=81).double() / n
    expected = chances[(sequences * code).sum(dim=1).argsort()]
    assert (found[expected == 0] == 0).all()
    # Five standard errors of a share, for each of 81 sequences.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_same_seed_same_text_and_the_global_state_stays():
    before = torch.get_rng_state()
    assert torch.equal(SMALL.sample(50, seed=3), SMALL.sample(50, seed=3))
    assert not torch.equal(SMALL.sample(50, seed=3), SMALL.sample(50, seed=4))
    first, second = (next(SMALL.batches(8, seed=1)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (8, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_judge_is_the_language_but_for_its_smoothing():
    logits = SMALL.judge(smoothing=1e-6)(torch.arange(6)[None], torch.ones(1, 6))
    torch.testing.assert_close(logits.softmax(dim=-1)[0], SMALL.transitions, atol=2e-6, rtol=0)
    assert logits.isfinite().all()


# ------------------------------------------------------------------------------------------------ the exact denoiser


@pytest.mark.parametrize("pattern", [(3, 3, 3, 3), (3, 1, 3, 3), (0, 3, 3, 2), (3, 3, 1, 3)])
def test_masks_are_predicted_as_enumeration_conditions_them(pattern):
    sequences, chances = enumerated(TINY)
    x_t = torch.tensor([pattern])
    process = TINY.process("masked")
    p = process.log_probs(ExactDenoiser(TINY, process)(x_t, torch.ones(1)), x_t).exp()[0, :, :3].double()
    fits = ((sequences == x_t) | (x_t == 3)).all(dim=1)
    if not chances[fits].sum() > 0:
        pytest.fail("the pattern is impossible in this language: choose another")
    for position in range(4):
        expected = torch.zeros(3, dtype=torch.float64).index_add_(0, sequences[fits, position], chances[fits])
        torch.testing.assert_close(p[position], expected / expected.sum(), atol=1e-6, rtol=0)  # float32 logits


@pytest.mark.parametrize("alpha", [0.02, 0.5, 0.95])
def test_uniform_noise_is_undone_as_enumeration_does_without_the_position_itself(alpha):
    sequences, chances = enumerated(TINY)
    x_t, process = torch.tensor([[0, 2, 1, 1], [2, 2, 2, 0]]), TINY.process("uniform")
    p = ExactDenoiser(TINY, process)(x_t, torch.full((2,), -math.log(alpha))).exp().double()
    for row, noisy in enumerate(x_t):
        evidence = alpha * (sequences == noisy) + (1 - alpha) / 3
        for position in range(4):
            others = [j for j in range(4) if j != position]
            weight = chances * evidence[:, others].prod(dim=1)
            expected = torch.zeros(3, dtype=torch.float64).index_add_(0, sequences[:, position], weight)
            torch.testing.assert_close(p[row, position], expected / expected.sum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_the_bound_of_the_exact_denoiser_is_the_entropy_of_the_language(kind):
    words = SMALL.words
    # eps = 0 leaves no signal at t = 1, where the bound would have a term for the prior.
    schedule = LogLinear(eps=0)
    process = MaskedDiffusion(words + 1, schedule=schedule) if kind == "masked" else UniformDiffusion(words, schedule)
    generator = torch.Generator().manual_seed(0)
    x0 = SMALL.sample(20_000, generator=generator)
    noisy = process.corrupt(x0, generator=generator)
    bound = process.nelbo(noisy.denoise(ExactDenoiser(SMALL, process)), x0, noisy.x_t, noisy.t).double().mean(dim=1)
    error = bound.std().item() / math.sqrt(len(bound))
    assert error < 0.03
    assert bound.mean().item() == pytest.approx(SMALL.entropy, abs=4 * error)


def test_drawing_one_position_at_a_time_from_the_exact_denoiser_gives_the_language():
    process = SMALL.process("masked")
    found = few_step(SMALL, ExactDenoiser(SMALL, process), process, steps=(None,), sampler=FirstHitting(), samples=2000)
    measures = found.rows[0].measures
    assert measures.sequence_validity.estimate == 1
    # Sets of real text of this size scatter by about a fifth of the floor.
    assert measures.total_variation.estimate < 2 * measures.floor


def test_an_impossible_context_still_has_an_answer():
    language = MarkovLanguage(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), length=3)
    process = language.process("masked")
    logits = ExactDenoiser(language, process)(torch.tensor([[0, 2, 1]]), torch.ones(1))
    torch.testing.assert_close(logits[0, 1, :2].exp(), torch.tensor([0.5, 0.5]))


# ------------------------------------------------------------------------------------------------ the measures


def test_measures_are_those_of_hand_counts():
    language = MarkovLanguage(torch.tensor([[0.0, 1.0], [0.5, 0.5]]))  # pairs 01, 10, 11: a third each
    figures = measure_ids(language, torch.tensor([[0, 0, 1], [0, 1, 0]]))  # pairs 00, 01, 01, 10
    assert figures.validity.estimate == 0.75 and figures.sequence_validity.estimate == 0.5
    assert figures.total_variation.estimate == pytest.approx((1 / 4 + 1 / 6 + 1 / 12 + 1 / 3) / 2)
    assert figures.mode_imbalance.estimate == pytest.approx((2 / 3 - 1 / 3 + 0 + 1 / 3) / 2)
    assert figures.unigram_entropy == pytest.approx(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    pairs = [1 / 4, 1 / 2, 1 / 4]
    firsts = [3 / 4, 1 / 4]
    assert figures.conditional_entropy == pytest.approx(
        -sum(q * math.log(q) for q in pairs) + sum(q * math.log(q) for q in firsts)
    )


@given(st.integers(0, 1000))
def test_distances_are_half_the_summed_differences_whatever_the_samples(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, (40, 5), generator=generator)
    figures = measure_ids(SMALL, ids, floor=0.0, resamples=20)
    counts = torch.zeros(6, 6, dtype=torch.float64)
    for a, b in zip(ids[:, :-1].flatten(), ids[:, 1:].flatten(), strict=True):
        counts[a, b] += 1
    direct = (counts / counts.sum() - SMALL.pairs).abs().sum().item() / 2
    valid = torch.where(SMALL.allowed, counts, 0)
    among = (valid / valid.sum() - SMALL.pairs).abs().sum().item() / 2
    assert figures.total_variation.estimate == pytest.approx(direct, abs=1e-12)
    assert figures.mode_imbalance.estimate == pytest.approx(among, abs=1e-12)
    assert figures.validity.estimate == pytest.approx((valid.sum() / counts.sum()).item(), abs=1e-12)


def test_an_interval_stands_although_some_redraws_have_no_valid_pair():
    language = MarkovLanguage(torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    figures = measure_ids(language, torch.tensor([[0, 0, 0], [0, 1, 0]]))  # a quarter of the redraws is 000 twice
    low, high = figures.mode_imbalance[1:]
    assert low <= figures.mode_imbalance.estimate <= high
    none = measure_ids(language, torch.tensor([[0, 0, 0], [0, 0, 0]]))
    assert all(map(math.isnan, none.mode_imbalance)) and none.total_variation.estimate == 1


def test_real_text_lies_at_the_floor_with_the_true_entropies():
    language = MarkovLanguage.random()
    figures = measure_ids(language, language.sample(4096, seed=1))
    assert figures.validity == (1, 1, 1) and figures.sequence_validity == (1, 1, 1)
    # One set scatters around the mean over sets by about 9%; the first trials of such languages saw 0.022.
    assert figures.total_variation.estimate == pytest.approx(figures.floor, rel=0.4)
    assert figures.floor == pytest.approx(0.0193, abs=0.002)
    assert figures.unigram_entropy == pytest.approx(language.unigram_entropy, abs=0.02)
    assert figures.conditional_entropy == pytest.approx(language.conditional_entropy, abs=0.02)


def test_the_floor_falls_with_the_root_of_the_number_of_sequences():
    assert real_floor(SMALL, 500, repeats=40) / real_floor(SMALL, 8000, repeats=40) == pytest.approx(4, rel=0.25)


def test_forgetting_a_mode_shows_in_imbalance_and_not_in_validity():
    ids = SMALL.sample(3000, seed=0)
    first, second = SMALL.allowed[0].nonzero()[:, 0].tolist()
    lost = ((ids[:, :-1] == 0) & (ids[:, 1:] == first)).any(dim=1)
    figures = measure_ids(SMALL, ids[~lost])
    assert figures.validity.estimate == 1
    assert figures.mode_imbalance.low > 2 * figures.floor
    assert figures.conditional_entropy < SMALL.conditional_entropy
    assert second != first


@pytest.mark.statistical
def test_intervals_of_a_distance_cover_what_large_samples_say():
    """Samples with a wrong word in one place of ten, far from the floor: the linearised interval is a good one."""

    def noisy(n, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = SMALL.sample(n, generator=generator)
        return torch.where(
            torch.rand(n, 5, generator=generator) < 0.1, torch.randint(6, (n, 5), generator=generator), ids
        )

    truth = measure_ids(SMALL, noisy(200_000, 99), floor=0.0, resamples=2)
    covered = {"validity": 0, "total_variation": 0}
    for seed in range(60):
        figures = measure_ids(SMALL, noisy(2000, seed), floor=0.0, resamples=200, seed=seed)
        for name in covered:
            interval = getattr(figures, name)
            covered[name] += interval.low <= getattr(truth, name).estimate <= interval.high
    # 57 of 60 expected, 1.7 standard deviation; the plug-in distance lies a little above the truth.
    assert covered["validity"] >= 51 and covered["total_variation"] >= 48


# ------------------------------------------------------------------------------------------------ few steps


def test_rows_repeat_with_the_seed_and_do_not_depend_on_the_batch():
    process = SMALL.process("uniform")
    denoiser = ExactDenoiser(SMALL, process)
    first, second = (
        few_step(SMALL, denoiser, process, steps=(2, 4), samples=60, batch_size=size).rows for size in (60, 17)
    )
    assert [row.nfe for row in first] == [2, 4]
    assert first == second


def test_more_steps_come_nearer_and_the_best_row_is_found():
    process = SMALL.process("masked")
    found = few_step(
        SMALL, ExactDenoiser(SMALL, process), process, steps=(1, 2, 8), temperatures=(0.3, 1.0), samples=1000
    )
    at_one = [row.measures for row in found.rows if row.temperature == 1]
    distance = [measures.total_variation.estimate for measures in at_one]
    assert distance == sorted(distance, reverse=True) and distance[-1] > found.real.total_variation.estimate
    assert found.best(1).measures.total_variation.estimate == min(
        row.measures.total_variation.estimate for row in found.rows if row.nfe == 1
    )
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["true"]["entropy"] == SMALL.entropy and len(plain["rows"]) == 6
    assert plain["rows"][0]["validity"]["estimate"] == found.rows[0].measures.validity.estimate


def test_one_step_from_masks_draws_independent_words():
    """Every position then has the stationary law, and a pair is valid by accident alone."""
    process = SMALL.process("masked")
    found = few_step(SMALL, ExactDenoiser(SMALL, process), process, steps=(1,), samples=2000).rows[0].measures
    independent = SMALL.stationary[:, None] * SMALL.stationary
    assert found.validity.low <= independent[SMALL.allowed].sum().item() <= found.validity.high
    assert found.total_variation.estimate == pytest.approx((independent - SMALL.pairs).abs().sum().item() / 2, abs=0.02)
    assert found.unigram_entropy == pytest.approx(SMALL.unigram_entropy, abs=0.02)


def test_the_table_shows_real_text_below_the_rows():
    from rich.console import Console

    process = SMALL.process("masked")
    found = few_step(SMALL, ExactDenoiser(SMALL, process), process, steps=(2,), samples=50)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert "TV among valid" in text and "real" in text and f"true {SMALL.unigram_entropy:.3f}" in text


# ------------------------------------------------------------------------------------------------ bad input

PROCESS = SMALL.process("uniform")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: MarkovLanguage(torch.ones(2, 3) / 3), "square matrix"),
        (lambda: MarkovLanguage(torch.tensor([[1.5, -0.5], [0.5, 0.5]])), "square matrix"),
        (lambda: MarkovLanguage(torch.ones(2, 2)), "every row of transitions must sum to 1"),
        (lambda: MarkovLanguage(torch.eye(2)), "every word be reached from every other"),
        (lambda: MarkovLanguage(torch.ones(2, 2) / 2, length=1), "length must be an integer of at least 2"),
        (lambda: MarkovLanguage.random(words=3, successors=4), "successors must lie in 1 to 3"),
        (lambda: SMALL.sample(2, seed=0, generator=torch.Generator()), "cannot both be given"),
        (lambda: SMALL.process("gaussian"), "must be one of 'uniform', 'masked'"),
        (lambda: SMALL.judge(smoothing=0.0), r"smoothing must lie in \(0, 1\]"),
        (lambda: ExactDenoiser(SMALL, MaskedDiffusion(7, mask_id=0)), "mask_id = 6"),
        (lambda: ExactDenoiser(SMALL, UniformDiffusion(7)), "uniform over V = 6 words"),
        (lambda: ExactDenoiser(SMALL, PROCESS)(torch.zeros(2, 3).long(), None), r"sigma must have shape \(B,\)"),
        (lambda: measure_ids(SMALL, torch.full((3, 5), 6)), "ids from 6 to 6"),
        (lambda: measure_ids(SMALL, torch.zeros(1, 5).long()), "at least 2 sequences of at least 2 words"),
        (lambda: few_step(SMALL, ExactDenoiser(SMALL, PROCESS), PROCESS, steps=()), "at least one entry each"),
        (
            lambda: few_step(SMALL, ExactDenoiser(SMALL, PROCESS), PROCESS, steps=8),
            r"(?s)steps must be a list\..*Pass steps=\(8,\)",
        ),
        (
            lambda: few_step(SMALL, ExactDenoiser(SMALL, PROCESS), PROCESS, temperatures=0.8),
            r"temperatures must be a list\.",
        ),
        (
            lambda: few_step(SMALL, ExactDenoiser(SMALL, PROCESS), PROCESS, steps=(2,), samples=2).best(3),
            r"no row has nfe 3",
        ),
    ],
)
def test_what_cannot_be_measured_is_named(call, says):
    with pytest.raises(TokenDriftError, match=says):
        call()


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_training_moves_every_measure_towards_the_truth(kind):
    language = MarkovLanguage.random(words=12, successors=2, length=8, seed=0)
    process = language.process(kind)
    torch.manual_seed(0)
    sizes = DiTConfig(
        process.vocab_size, 8, hidden_dim=48, cond_dim=16, n_blocks=2, n_heads=4, dropout=0.0,
        time_conditioning=kind == "uniform",
    )  # fmt: skip
    model = DiT(sizes).eval()
    objective = Continuation if kind == "uniform" else Denoising

    def measured(denoiser):
        return few_step(language, denoiser, process, steps=(4,), samples=2048).rows[0].measures

    untrained = measured(model)
    loop = LoopConfig(600, batch_size=128, learning_rate=3e-3, warmup=50)
    train(model, objective(process, torch.Generator().manual_seed(1)), language.batches(128, seed=2), loop)
    base = measured(model)
    assert base.validity.low > untrained.validity.high
    assert base.total_variation.high < untrained.total_variation.low
    assert abs(base.unigram_entropy - language.unigram_entropy) < 0.1
    # Validity at temperature 1 has no way past the exact denoiser but sharper predictions than its own.
    exact = measured(ExactDenoiser(language, process))
    assert base.validity.low <= exact.validity.high
