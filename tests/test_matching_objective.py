"""Distribution matching on the model's own chains: where it reads, what it draws, what follows whom, and resuming."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import matching_rank_worker
import pytest
import torch
from forked import run_ranks
from live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint

from tokendrift import PairDriftLoss, TokenDriftError
from tokendrift.diffusion import Corruption, MaskedDiffusion, UniformDiffusion
from tokendrift.distribution_matching import log_ratio
from tokendrift.markov import MarkovLanguage
from tokendrift.models import DiT, DiTConfig
from tokendrift.models.low_rank import low_rank_copy
from tokendrift.models.random_input import RandomMaskEmbedding
from tokendrift.training import DistributionMatching, MatchingConfig, OwnTrajectories, make_config

PAGE = Path(__file__).parents[1] / "docs" / "matching.md"
LANGUAGE = MarkovLanguage.random(words=6, successors=2, length=8, seed=0)
# The small students of these tests write anything, which is warned of.
pytestmark = pytest.mark.filterwarnings("ignore:the student writes repetitive text")
KINDS = pytest.mark.parametrize("kind", ["masked", "uniform"])


def small_model(process, seed=0, width=16, dropout=0.0):
    sizes = {"hidden_dim": width, "cond_dim": 4, "n_blocks": 1, "n_heads": 2, "dropout": dropout}
    model = DiT(DiTConfig(process.vocab_size, LANGUAGE.length, mask_id=process.mask_id, **sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def frozen(model):
    return copy.deepcopy(model).eval().requires_grad_(False)


PLAIN = {"chains": (2, 4), "pair_weight": 0.0, "random_input": 0}  # the field alone, for any model


def objective(process, teacher, pair_loss=None, micro_batches=1, **settings):
    options = {"generator": torch.Generator().manual_seed(1), "pair_loss": pair_loss, "micro_batches": micro_batches}
    return DistributionMatching(process, frozen(teacher), config=MatchingConfig(**PLAIN | settings), **options)


# ------------------------------------------------------------------------------------------------ the student's loss


@KINDS
def test_a_student_that_is_the_teacher_has_no_gradient_at_first(kind):
    """Auxiliary model and teacher agree before the first step."""
    process = LANGUAGE.process(kind)
    model = small_model(process)
    learn = objective(process, model, base_weight=0.0)
    learn(model, LANGUAGE.sample(8, seed=0)).loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@KINDS
@pytest.mark.parametrize("form", ["log_ratio", "bounded"])
def test_exchanging_teacher_and_auxiliary_model_turns_the_gradient(kind, form):
    process = LANGUAGE.process(kind)
    student, one, other = (small_model(process, seed) for seed in range(3))
    slopes = []
    for teacher, auxiliary in ((one, other), (other, one)):
        learn = DistributionMatching(
            process,
            frozen(teacher),
            copy.deepcopy(auxiliary),
            MatchingConfig(**PLAIN, field_form=form, base_weight=0.0),
            generator=torch.Generator().manual_seed(0),
        )
        loss = learn(student, LANGUAGE.sample(8, seed=0)).loss
        slopes.append(
            torch.cat(
                [
                    s.flatten()
                    for s in torch.autograd.grad(loss, student.parameters(), allow_unused=True)
                    if s is not None
                ]
            )
        )
    assert slopes[0].abs().max() > 0
    torch.testing.assert_close(slopes[0], -slopes[1], rtol=1e-5, atol=1e-8)


class Watched(torch.nn.Module):
    """A denoiser that remembers what it was asked, and predicts one law at every position."""

    def __init__(self, process, law):
        super().__init__()
        self.logits, self.asked = torch.nn.Parameter(law.log()), []

    def forward(self, ids, sigma):
        self.asked.append((ids.clone(), sigma.clone()))
        return self.logits.expand(*ids.shape, -1)


@KINDS
def test_both_networks_read_a_completion_of_the_student_that_is_corrupted_to_an_earlier_time(kind):
    process = LANGUAGE.process(kind)
    law = torch.full((process.vocab_size,), 1e-4)
    law[2] = 1  # the student writes this token alone
    student, teacher, auxiliary = (Watched(process, law) for _ in range(3))
    learn = DistributionMatching(
        process,
        frozen(teacher),
        auxiliary,
        MatchingConfig(**PLAIN, base_weight=0.0),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in range(4):
        for network in (student, learn.teacher, auxiliary):
            network.asked.clear()
        learn(student, LANGUAGE.sample(64, seed=0))
        (z, sigma), (same, same_sigma) = learn.teacher.asked[-1], auxiliary.asked[-1]
        assert torch.equal(z, same) and torch.equal(sigma, same_sigma)
        _, at = student.asked[-1]
        assert (sigma <= at + 1e-6).all() and sigma.unique().numel() > 32
        completion = learn.completions.pop()
        assert (completion == 2).float().mean() > (0.95 if kind == "masked" else 0.6)
        kept = z == completion
        hidden = 1 - (-sigma).exp().mean()
        if kind == "masked":
            assert (kept | (z == process.mask_id)).all()
            assert (~kept).float().mean() == pytest.approx(hidden.item(), abs=0.1)


def test_masked_positions_that_were_not_predicted_are_not_read():
    process, read = LANGUAGE.process("masked"), []
    model = small_model(process)
    learn = objective(process, model, base_weight=0.0)
    real = learn._logits
    learn._logits = lambda network, noised, where, given: (
        read.append((noised.x_t, where)),
        real(network, noised, where, given),
    )[1]
    learn(model, LANGUAGE.sample(32, seed=0))
    z, where = read[0]
    assert where.any() and (z[where] == process.mask_id).all()
    assert not where[z == process.mask_id].all()  # some were visible in x_t


def test_completions_keep_what_is_visible_and_hold_no_mask():
    process = LANGUAGE.process("masked")
    model = small_model(process)
    learn = objective(process, model)
    learn(model, LANGUAGE.sample(16, seed=0))
    assert (learn.completions[0] != process.mask_id).all()
    x_t = torch.tensor([[1, process.mask_id, 3]])
    logits = torch.zeros(1, 3, process.vocab_size)
    assert learn._drawn(logits, x_t, x_t == process.mask_id)[0, [0, 2]].tolist() == [1, 3]


def test_completions_follow_the_law(monkeypatch):
    process = LANGUAGE.process("masked")
    learn = objective(process, small_model(process))
    monkeypatch.setattr("tokendrift.training.objectives.matching_objective.ELEMENTS", {"cpu": 1000})  # in many parts
    logits = torch.randn(process.vocab_size, generator=torch.Generator().manual_seed(0))
    x_t = torch.full((200, 50), process.mask_id)
    drawn = learn._drawn(logits.expand(200, 50, -1), x_t, x_t == process.mask_id)
    law = logits[:-1].softmax(0)
    torch.testing.assert_close(drawn.flatten().bincount(minlength=6) / drawn.numel(), law, atol=0.02, rtol=0)


# ------------------------------------------------------------------------------------------------ positions


def test_positions_of_the_chains_have_shares_that_add_to_one():
    masked, uniform = MaskedDiffusion(7), UniformDiffusion(6)
    even = dict.fromkeys([(2, 1), (4, 1), (4, 2), (4, 3)], 0.25)
    assert MatchingConfig(**PLAIN).positions(masked) == even
    assert MatchingConfig(**PLAIN).positions(uniform) == dict.fromkeys([(4, 0), *even], 0.2)
    assert MatchingConfig(**PLAIN, start_share=0.5).positions(masked) == {(4, 0): 0.5} | dict.fromkeys(even, 0.125)
    assert MatchingConfig(**PLAIN, start_share=1).positions(masked) == {(4, 0): 1.0}
    assert MatchingConfig(chains=(1,)).positions(uniform) == {(1, 0): 1.0}
    with pytest.raises(TokenDriftError, match="start_share to 1"):
        MatchingConfig(chains=(1,), start_share=0.5).positions(uniform)
    with_start = {(4, 0): 3 / 7} | dict.fromkeys(even, 1 / 7)  # three of the seven calls of these chains are at a start
    assert MatchingConfig().positions(masked) == pytest.approx(with_start)


def test_positions_come_at_their_shares():
    process = LANGUAGE.process("masked")
    learn = objective(process, small_model(process), start_share=0.5)
    found = torch.tensor([learn._position()[0] for _ in range(2000)]).bincount() / 2000
    torch.testing.assert_close(found, torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125]), atol=0.04, rtol=0)


# ------------------------------------------------------------------------------------------------ the auxiliary model


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("masked", 0),
        ("uniform", 4),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("masked", 4), ("uniform", 0))),
    ],
)
def test_the_auxiliary_model_follows_the_students_samples_and_the_teacher_stays(kind, rank):
    process = LANGUAGE.process(kind)
    teacher, student = small_model(process, 0), small_model(process, 1)
    learn = objective(process, teacher, auxiliary_rank=rank, auxiliary_rate=2e-2, base_weight=0.0)
    before = {name: value.clone() for name, value in learn.teacher.state_dict().items()}
    differences = []
    for _ in range(20):
        logs = learn(student, LANGUAGE.sample(32, seed=0), log=True).logs
        differences.append(float(logs["teacher_nelbo"] - logs["auxiliary_nelbo"]))
        learn.update_auxiliary()
    assert differences[0] == pytest.approx(0, abs=1e-5)
    assert sum(differences[-10:]) / 10 > 0.2
    assert all(torch.equal(before[name], value) for name, value in learn.teacher.state_dict().items())


def test_low_rank_adapters_share_the_weights_and_start_as_the_model():
    process = LANGUAGE.process("uniform")
    model = frozen(small_model(process))
    adapted = low_rank_copy(model, 3)
    ids, sigma = LANGUAGE.sample(4, seed=0), torch.ones(4)
    assert torch.equal(adapted(ids, sigma), model(ids, sigma))
    own = {id(p) for p in model.parameters()}
    assert all(p.requires_grad != (id(p) in own) for p in adapted.parameters())
    adapted(ids, sigma).sum().backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if name.endswith(".up"))
    with pytest.raises(TokenDriftError, match="frozen"):
        low_rank_copy(small_model(process), 3)
    with pytest.raises(TokenDriftError, match=r"no nn\.Linear"):
        low_rank_copy(torch.nn.Identity(), 3)


def test_the_auxiliary_model_must_be_trained_between_steps():
    process = LANGUAGE.process("uniform")
    model = small_model(process)
    learn = objective(process, model, micro_batches=2)
    with pytest.raises(TokenDriftError, match="no completions"):
        learn.update_auxiliary()
    for _ in range(2):
        learn(model, LANGUAGE.sample(4, seed=0))
    with pytest.raises(TokenDriftError, match="update_auxiliary"):
        learn(model, LANGUAGE.sample(4, seed=0))
    learn.update_auxiliary()
    learn(model, LANGUAGE.sample(4, seed=0))
    learn.micro_batches = None
    for _ in range(3):
        learn(model, LANGUAGE.sample(4, seed=0))
    assert len(learn.completions) == 4


def test_its_networks_move_together():
    process = LANGUAGE.process("uniform")
    learn = objective(process, small_model(process), pair_loss=PairDriftLoss(6), pair_weight=1.0, auxiliary_rank=2)
    assert list(learn.module) == [learn.teacher, learn.auxiliary.network, learn.pair_loss]
    learn.module.double()
    learn(small_model(process).double(), LANGUAGE.sample(4, seed=0)).loss.backward()
    assert learn.update_auxiliary().isfinite()


def test_dropout_reaches_the_student_alone():
    process = LANGUAGE.process("uniform")
    model = small_model(process, dropout=0.5)
    learn, modes = objective(process, model, base_weight=0.0), []
    for network in (model, learn.teacher, learn.auxiliary.network):
        network.blocks[0].register_forward_pre_hook(lambda block, _: modes.append(block.training))
    learn.shares = {(1, 0): 1.0}
    model.train()
    learn(model, LANGUAGE.sample(4, seed=0))
    learn.update_auxiliary()
    assert modes == [True, False, False, False]


@KINDS
def test_student_and_auxiliary_model_together_find_the_law_of_the_teacher(kind):
    """Of texts of independent tokens, whose law a student of one step can have exactly."""
    process = LANGUAGE.process(kind)
    law = torch.full((process.vocab_size,), 1e-6)
    law[:6] = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.05, 0.05])
    even = torch.full((process.vocab_size,), 1 / 6)
    student, teacher = Watched(process, even), frozen(Watched(process, law))
    config = MatchingConfig(**PLAIN, base_weight=0.0, auxiliary_rate=0.1)
    generator = torch.Generator().manual_seed(0)
    learn = DistributionMatching(process, teacher, Watched(process, even), config, generator=generator)
    text, distances = torch.zeros(64, 8, dtype=torch.int64), []
    for _ in range(100):
        student.logits.grad = None
        learn(student, text).loss.backward()
        student.logits.data -= 0.2 * student.logits.grad
        learn.update_auxiliary()
        found = student.logits.detach()[:6].softmax(0)
        distances.append((found - law[:6]).abs().sum().item() / 2)
    assert distances[0] > 0.25 and sum(distances[-30:]) / 30 < 0.08


# ------------------------------------------------------------------------------------------------ others' settings


def test_loss_and_gradient_of_idlm_are_those_of_its_code():
    case = json.loads((Path(__file__).parent / "fixtures" / "peers.json").read_text())["idlm"]
    process, x_t, z = MaskedDiffusion(7, case["mask_id"]), torch.tensor(case["x_t"]), torch.tensor(case["z"])
    logits, teacher, fake, t = (torch.tensor(case[n], dtype=torch.float64) for n in ("student", "teacher", "fake", "t"))
    config = {"position_weight": "nelbo", "renoising": "same", "student_inputs": "text", "field_clip": math.inf}
    learn = objective(process, DiT(DiTConfig(7, 6, 4, 4, 1, 1, mask_id=6)), **config, base_weight=0.0)
    noised = Corruption(z, process.predicted(z), t, process.sigma(t))
    read = process.predicted(x_t) & noised.predicted
    loss, _ = learn._matched(logits.requires_grad_(), teacher[read], fake[read], read, noised)
    loss = loss * x_t.shape[1]  # their loss is the sum over the positions of a text
    loss.backward()
    # Theirs also counts tokens that the student has seen, which have no gradient.
    seen = noised.predicted & ~read
    ratio = log_ratio(teacher, fake, 6).gather(-1, x_t[..., None])[..., 0]
    constant = -(ratio / t[:, None])[seen].sum() / len(x_t)
    assert loss.item() + constant.item() == pytest.approx(case["loss"], abs=1e-9)
    torch.testing.assert_close(logits.grad, torch.tensor(case["gradient"], dtype=torch.float64), atol=1e-9, rtol=1e-9)


@KINDS
@pytest.mark.filterwarnings("always:the student writes repetitive text")
def test_a_student_that_repeats_one_token_is_warned_of_once(kind, recwarn):
    process = LANGUAGE.process(kind)
    text, teacher = LANGUAGE.sample(8, seed=0), small_model(process)
    learn = objective(process, teacher)
    _, logs = learn(Watched(process, torch.ones(process.vocab_size)), text, log=True)
    assert not recwarn and logs["completion_entropy"] > 0.7 * logs["text_entropy"]
    law = torch.full((process.vocab_size,), 1e-6)
    law[0] = 1
    for _ in range(2):
        learn.update_auxiliary()
        _, logs = learn(Watched(process, law), text, log=True)
    found = [str(one.message) for one in recwarn]
    assert len(found) == 1 and "repetitive text" in found[0]
    assert f"{logs['text_entropy']:.2f}. It moves faster" in found[0]


@KINDS
@pytest.mark.parametrize("preset", ["idlm", "d-mmd"])
def test_the_settings_of_others_read_corrupted_text_and_their_own_times(kind, preset):
    process, settings = LANGUAGE.process(kind), make_config(preset=preset, values={"checkpoint": "base"}).objective
    model = small_model(process)
    options = dataclasses.asdict(settings) | {"random_input": 0, "auxiliary_rate": 1e-2}
    learn = objective(process, small_model(process, 1), **options)
    asked, times = [], []
    renoised = learn._renoised
    learn._renoised = lambda ids, t: (times.append(t), asked.append(renoised(ids, t))) and asked[-1]
    loss, logs = learn(model, LANGUAGE.sample(32, seed=0), log=True)
    loss.backward()
    assert torch.isfinite(loss) and set(logs) > {"matching", "auxiliary_nelbo"} and "nelbo" not in logs
    assert times[0].unique().numel() == 32  # one for each text
    gap = times[0] - asked[0].t
    assert (gap == 0).all() if preset == "idlm" else ((gap >= 0) & (gap <= 1 / 16 + 1e-6)).all()
    learn.config = dataclasses.replace(settings, renoising="any")
    independent = times[0] - renoised(learn.completions[0], times[0]).t
    assert independent.min() < -1 / 4 and independent.max() > 1 / 4
    learn.config = settings
    before = copy.deepcopy(learn.auxiliary.network.state_dict())
    assert learn.update_auxiliary().isfinite()
    assert any(not torch.equal(before[name], value) for name, value in learn.auxiliary.network.state_dict().items())


def test_the_second_term_of_d_mmd_keeps_the_auxiliary_model_near_the_teacher():
    process = LANGUAGE.process("uniform")
    model, found = small_model(process, 1), []
    for weight in (0.0, 10.0):
        terms = {"auxiliary_loss": "cross_entropy", "auxiliary_teacher_weight": weight, "auxiliary_rate": 1e-2}
        learn = objective(process, small_model(process), base_weight=0.0, **terms)
        losses = []
        for _ in range(10):
            learn(model, LANGUAGE.sample(16, seed=0))
            losses.append(float(learn.update_auxiliary()))
        assert weight or losses[-1] < losses[0]
        own, theirs = learn.auxiliary.network.state_dict(), learn.teacher.state_dict()
        found.append(sum((own[name] - theirs[name]).square().sum() for name in own))
    assert found[1] < found[0]
    with pytest.raises(TokenDriftError, match="auxiliary_teacher_weight was given, but auxiliary_loss is nelbo"):
        objective(process, model, auxiliary_teacher_weight=1.0)


def test_the_cross_entropy_of_a_uniform_state_model_is_that_of_all_noisy_tokens():
    process = LANGUAGE.process("uniform")
    settings = {"auxiliary_loss": "cross_entropy", "auxiliary_teacher_weight": 1.0}
    learn = objective(process, small_model(process), base_weight=0.0, **settings)
    clean, times = LANGUAGE.sample(16, seed=0), torch.linspace(0.1, 0.9, 16)
    noised = process.corrupt(clean, times, generator=torch.Generator().manual_seed(0))
    learn._renoised = lambda ids, times: noised
    laws = [
        process.posterior(network(noised.x_t, noised.sigma), noised.x_t, times, torch.zeros(16)).log()
        for network in (learn.auxiliary.network, learn.teacher)
    ]
    gap = torch.nn.functional.kl_div(*laws, log_target=True, reduction="sum") / clean.numel()
    expected = gap - laws[0].gather(-1, clean[..., None]).mean()
    torch.testing.assert_close(learn._cross_entropy(clean, times), expected, rtol=1e-4, atol=1e-5)


def test_a_setting_of_uniform_state_models_is_refused_for_masked_ones():
    process = LANGUAGE.process("masked")
    with pytest.raises(TokenDriftError, match="replaced_only was given, but a masked model is read"):
        objective(process, small_model(process), replaced_only=True)


# ------------------------------------------------------------------------------------------------ state and ranks


def run(process, steps, state=None, **settings):
    """Train for some steps with both optimisers; return all that a checkpoint holds."""
    student = small_model(process, 1)
    pairs = PairDriftLoss(process.vocab_size, mask_id=process.mask_id)
    learn = objective(process, small_model(process), pair_loss=pairs, pair_weight=0.5, **settings)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    first = 0
    if state is not None:
        first, weights, moments, own = state
        student.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        learn.load_state_dict(own)
    for step in range(first, steps):
        if len(learn.completions) < learn.micro_batches:
            learn(student, LANGUAGE.sample(8, seed=step), log=step % 2 == 0).loss.backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
            learn.update_auxiliary()
    return copy.deepcopy((steps, student.state_dict(), optimizer.state_dict(), learn.state_dict()))


@KINDS
def test_the_law_of_pairs_can_be_matched_beside_it_with_a_law_for_each_position(kind):
    process = LANGUAGE.process(kind)
    model, shares = small_model(process), MatchingConfig(**PLAIN).positions(process)
    pairs = PairDriftLoss(process.vocab_size, strata=len(shares), mask_id=process.mask_id)
    learn = objective(process, model, pair_loss=pairs, pair_weight=0.5, base_weight=0.25)
    loss, logs = learn(model, LANGUAGE.sample(8, seed=0), log=True)
    torch.testing.assert_close(loss, logs["matching"] + 0.5 * logs["drift"] + 0.25 * logs["nelbo"])
    assert pairs.generated_weight.sum() == 1 and 0 < logs["total_variation"] < 1


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("masked", 0),
        ("uniform", 2),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("masked", 2), ("uniform", 0))),
    ],
)
def test_a_run_that_is_resumed_ends_with_the_same_bits(kind, rank):
    process, settings = LANGUAGE.process(kind), {"auxiliary_rank": rank, "micro_batches": 2}
    _, whole, moments, own = run(process, 6, **settings)
    state = run(process, 4, run(process, 2, **settings), **settings)
    _, resumed, moments_resumed, own_resumed = run(process, 6, state, **settings)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert own.keys() == own_resumed.keys()
    assert all(torch.equal(own[name], own_resumed[name]) for name in own)
    for number, entry in moments["state"].items():
        assert all(torch.equal(value, moments_resumed["state"][number][name]) for name, value in entry.items())


def test_completions_that_wait_are_in_the_state():
    process = LANGUAGE.process("uniform")
    model = small_model(process)
    learn, other = (objective(process, model) for _ in range(2))
    learn(model, LANGUAGE.sample(4, seed=0))
    state = learn.state_dict()
    other.load_state_dict(state)
    assert torch.equal(learn.update_auxiliary(), other.update_auxiliary())
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@KINDS
def test_defaults_follow_the_process(kind):
    chosen = MatchingConfig().for_process(LANGUAGE.process(kind))
    found = (chosen.chains, chosen.pair_weight, chosen.random_input)
    assert found == (((1, 2, 4), 0.2, 32) if kind == "masked" else ((2, 4), 1.0, 0))
    assert MatchingConfig(chains=(8,), pair_weight=0.0, random_input=0).for_process(LANGUAGE.process(kind)).chains == (
        8,
    )
    again = MatchingConfig().for_process(LANGUAGE.process("masked"), numbers=16)  # a model that has one already
    assert (again.chains, again.random_input) == ((1, 2, 4), 0)


def test_low_rank_adapters_take_part_where_the_logits_of_some_positions_are_computed():
    process = LANGUAGE.process("uniform")
    adapted = low_rank_copy(frozen(small_model(process)), 2)
    with torch.no_grad():
        adapted.output_layer.linear.up.normal_()
    ids, wanted = LANGUAGE.sample(4, seed=0), torch.rand(4, LANGUAGE.length) < 0.5
    torch.testing.assert_close(adapted.logits_at(ids, torch.ones(4), wanted), adapted(ids, torch.ones(4))[wanted])


def test_what_is_logged_changes_no_result():
    process = LANGUAGE.process("masked")
    model = small_model(process)
    found = []
    for log in (False, True):
        learn = objective(process, model)
        loss = [learn(model, LANGUAGE.sample(8, seed=0), log=log).loss]
        learn.update_auxiliary()
        found.append([*loss, learn(model, LANGUAGE.sample(8, seed=1), log=log).loss])
    assert found[0] == found[1]


def test_another_state_is_refused():
    process = LANGUAGE.process("uniform")
    model = small_model(process)
    full, adapters = objective(process, model), objective(process, model, auxiliary_rank=2)
    with pytest.raises(TokenDriftError, match="another auxiliary model"):
        full.load_state_dict(adapters.state_dict())
    with pytest.raises(TokenDriftError, match="lacks generator"):
        full.load_state_dict({k: v for k, v in full.state_dict().items() if k != "generator"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auxiliary/weights/vocab_embed.embedding": torch.full((6, 16), torch.nan)}, "is not finite"),
        ({"auxiliary/exp_avg/vocab_embed.embedding": torch.zeros(2)}, "another auxiliary model"),
        ({"auxiliary/sum/vocab_embed.embedding": torch.zeros(6, 16)}, "another auxiliary model"),
        ({"completions/x": torch.zeros(1, 2).long()}, "completions must be a tensor"),
        ({"completions/0": torch.full((1, 2), 6)}, "completions has ids from 6 to 6"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, "the state of the generator does not fit"),
    ],
)
def test_a_state_that_no_objective_has_is_refused(change, said):
    process = LANGUAGE.process("uniform")
    learn = objective(process, small_model(process))
    with pytest.raises(TokenDriftError, match=said):
        learn.load_state_dict(learn.state_dict() | change)


@KINDS
@pytest.mark.parametrize("part", ["student", "teacher", "auxiliary"])
@pytest.mark.parametrize("readable", [True, False], ids=["cpu", "as on an accelerator"])
def test_a_network_that_overflows_is_refused_and_the_call_leaves_no_trace(kind, part, readable, monkeypatch):
    monkeypatch.setattr("tokendrift.distribution_matching.can_be_read", lambda values: readable)
    process = LANGUAGE.process(kind)
    student = small_model(process)
    learn = objective(process, student)
    before = learn.state_dict()
    broken = {"student": student, "teacher": learn.teacher, "auxiliary": learn.auxiliary.network}[part]
    weight = broken.output_layer.linear.bias.data
    value, weight[0] = weight[0].clone(), torch.nan
    with pytest.raises(TokenDriftError, match="not finite" if part == "student" else f"{part}_logits contain NaN"):
        learn(student, LANGUAGE.sample(4, seed=0))
    weight[0] = value
    after = learn.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    learn(student, LANGUAGE.sample(4, seed=0)).loss.backward()


def test_an_auxiliary_model_that_diverges_is_refused_and_keeps_its_weights():
    process = LANGUAGE.process("masked")
    model = small_model(process)
    learn = objective(process, model)
    learn(model, LANGUAGE.sample(4, seed=0))
    before = learn.state_dict()
    hook = learn.auxiliary.network.output_layer.linear.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(TokenDriftError, match="auxiliary model or its gradient is not finite"):
        learn.update_auxiliary()
    hook.remove()
    after = learn.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in learn.auxiliary.trained.values())
    assert learn.update_auxiliary().isfinite() and not learn.completions


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_call_that_is_repeated_in_the_backward_pass_is_refused(reentrant):
    process = LANGUAGE.process("masked")
    model = small_model(process)
    learn, x0 = objective(process, model, micro_batches=None), LANGUAGE.sample(4, seed=0)
    leaf = torch.zeros((), requires_grad=True)
    loss = checkpoint(lambda zero: learn(model, x0).loss + zero, leaf, use_reentrant=reentrant)
    with pytest.raises(TokenDriftError, match="computed again during the backward pass"):
        loss.backward()


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(matching_rank_worker.main, [(0, 1), (0, 2), (1, 2)])


def test_an_error_on_one_process_is_one_on_all_and_a_skipped_batch_leaves_them_in_step(ranks):
    (first, weights), (second, others) = (found["failures"] for found in ranks[1:])
    own = ["are not finite", "teacher_logits contain NaN", "auxiliary_logits contain NaN", "clean_ids has ids from"]
    for one, other, part in zip(first, second, own, strict=False):
        assert part in one[0] and "another rank" in other[0]
        assert one[1:] == other[1:] == (True, 0)  # generator, auxiliary model and completions are as before
    assert first[4] and second[4]
    assert "auxiliary model" in first[5][0] and "another rank" in second[5][0]
    assert first[5][1:] == second[5][1:] == (True, 1) and first[6] and second[6]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert "different calls of the objective" in first[7] and "different calls of the objective" in second[7]


def test_two_processes_do_what_one_does(ranks):
    one, first, second = ({key: value for key, value in found.items() if key != "failures"} for found in ranks)
    for case, expected in one.items():
        for found in (first[case], second[case]):
            assert found.keys() == expected.keys() and not any("completions" in name for name in found)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_low_rank_adapters_save_the_weights_gradients_and_moments_of_a_copy():
    """What is held for the auxiliary model: four tensors of the size of its trained parameters."""
    process = UniformDiffusion(64)
    teacher = frozen(DiT(DiTConfig(64, 8, hidden_dim=128, cond_dim=8, n_blocks=2, n_heads=2)))
    student, peaks, sizes = copy.deepcopy(teacher).requires_grad_(True), [], []
    for rank in (0, 2):
        with LiveBytes() as count:
            learn = objective(process, teacher, auxiliary_rank=rank, base_weight=0.0)
            learn.shares = {(1, 0): 1.0}
            for _ in range(2):  # moments appear with the first step
                learn(student, torch.zeros(2, 8, dtype=torch.int64)).loss.backward()
                student.zero_grad()
                learn.update_auxiliary()
        peaks.append(count.peak)
        sizes.append(4 * sum(p.nbytes for p in learn.auxiliary.trained.values()))
    assert sizes[1] < sizes[0] / 10
    assert peaks[0] - peaks[1] > 0.5 * (sizes[0] - sizes[1])


# ------------------------------------------------------------------------------------------------ random input


class Mixed(torch.nn.Module):
    """A masked denoiser with a random input."""

    def __init__(self, process, numbers):
        super().__init__()
        self.vocab_embed = RandomMaskEmbedding(process.vocab_size, 4, process.mask_id, numbers)
        self.head, self.seen = torch.nn.Linear(4, process.vocab_size), []

    def forward(self, ids, sigma, normals=None):
        self.seen.append(normals)
        return self.head(self.vocab_embed(ids, normals=normals))


def test_a_student_with_a_random_input_gets_its_numbers_from_the_generator_row_by_row():
    process = LANGUAGE.process("masked")
    teacher = frozen(small_model(process))
    whole = []
    for share, rows in (((0, 1), slice(0, 8)), ((1, 2), slice(4, 8))):
        student = Mixed(process, 3)
        generator = torch.Generator().manual_seed(0)
        config = MatchingConfig(**PLAIN, start_share=1, base_weight=0.0)
        learn = DistributionMatching(process, teacher, config=config, generator=generator, share=share)
        learn._over_ranks = lambda count, device, number: max(count, 1)
        learn(student, LANGUAGE.sample(8, seed=0)[rows]).loss.backward()
        whole.append(student.seen[-1])
    assert whole[0].shape == (8, 8, 3) and torch.equal(whole[0][4:], whole[1])


# ------------------------------------------------------------------------------------------------ input rules, page


@pytest.mark.parametrize(
    "settings",
    [
        {"chains": ()},
        {"chains": (0,)},
        {"start_share": 1.5},
        {"field_form": "log"},
        {"field_clip": 0.0},
        {"pair_weight": -1.0},
        {"auxiliary_steps": 0},
        {"auxiliary_rate": 0.0},
        {"auxiliary_rank": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(TokenDriftError, match=next(iter(settings))):
        MatchingConfig(**settings)


def test_parts_that_do_not_belong_together_are_refused():
    process = LANGUAGE.process("uniform")
    model = small_model(process)
    with pytest.raises(TokenDriftError, match="teacher must be frozen"):
        DistributionMatching(process, model)
    with pytest.raises(TokenDriftError, match="no parameter that requires gradients"):
        DistributionMatching(process, frozen(model), frozen(model))
    with pytest.raises(TokenDriftError, match="pair_loss was given, but pair_weight is 0"):
        objective(process, model, pair_loss=PairDriftLoss(6))
    masked = LANGUAGE.process("masked")
    with pytest.raises(TokenDriftError, match="32 random numbers at each masked position, but the model has no random"):
        DistributionMatching(masked, frozen(small_model(masked)))(small_model(masked), LANGUAGE.sample(4, seed=0))
    with pytest.raises(TokenDriftError, match="one stratum"):
        objective(process, model, pair_loss=PairDriftLoss(6, strata=2), pair_weight=1.0)


def test_the_recipe_of_the_page_runs():
    (recipe,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    process = LANGUAGE.process("masked")
    model = small_model(process)
    before = copy.deepcopy(model.state_dict())
    batches = [LANGUAGE.sample(8, seed=seed) for seed in range(3)]
    scope = {"process": process, "model": model, "batches": batches}
    exec(recipe, scope)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_autocast_of_the_frozen_networks():
    process = LANGUAGE.process("uniform")
    teacher, student = small_model(process, 0), small_model(process, 1)
    learn = DistributionMatching(
        process, frozen(teacher), generator=torch.Generator().manual_seed(0), autocast=torch.bfloat16
    )
    loss = learn(student, LANGUAGE.sample(8, seed=0)).loss
    loss.backward()
    learn.update_auxiliary()
    assert loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in learn.auxiliary.trained.values())


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_within_autocast_all_weights_are_trained(kind):
    """As in a training step of Lightning in bf16-mixed: chains and targets come first, without gradient."""
    process = LANGUAGE.process(kind)
    student, x0 = small_model(process, 1), LANGUAGE.sample(8, seed=0)
    own = OwnTrajectories(process, PairDriftLoss(process.vocab_size, mask_id=process.mask_id))
    learn = objective(process, small_model(process, 0))
    before = copy.deepcopy(learn.auxiliary.network)
    for loss_of in (own, learn):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(student, x0).loss.backward()
            if loss_of is learn:
                learn.update_auxiliary()
        assert all(parameter.grad is not None for parameter in student.parameters())
    pairs = zip(before.parameters(), learn.auxiliary.network.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)
