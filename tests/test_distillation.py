"""Distillation in rounds: the targets of its authors' code, what the laws say of them, rounds, ranks and resuming."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from test_matching_objective import LANGUAGE, frozen, small_model

from tokendrift import TokenDriftError
from tokendrift.diffusion import ArgmaxNoise, Corruption, GaussianDuality, MaskedDiffusion, UniformDiffusion
from tokendrift.models import DiT
from tokendrift.training import (
    ConsistencyDistillation,
    ConsistencyDistillationConfig,
    LoopConfig,
    ObjectiveSetup,
    OwnChains,
    SelfDistillation,
    SelfDistillationConfig,
    divergence,
    make_config,
    train,
)
from tokendrift.training.objectives.rounds import DIVERGENCES

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "peers.json").read_text())
PAGE = (Path(__file__).parents[1] / "docs" / "peers.md").read_text(encoding="utf-8")
EXACT = {"atol": 1e-9, "rtol": 1e-9}
METHODS = [("masked", SelfDistillation), ("uniform", SelfDistillation), ("uniform", ConsistencyDistillation)]
ALL = pytest.mark.parametrize(("kind", "method"), METHODS)


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


def build(method, process, teacher, share=(0, 1), **settings):
    config = SelfDistillationConfig if method is SelfDistillation else ConsistencyDistillationConfig
    generator = torch.Generator().manual_seed(1)
    return method(process, frozen(teacher), config(**settings), generator=generator, share=share)


class Tables(torch.nn.Module):
    """The network of the golden numbers: logits of a token, of the one before it, and of the position."""

    def __init__(self, tables, mask_id):
        super().__init__()
        self.tables, self.mask_id = [numbers(table) for table in tables], mask_id

    def forward(self, ids, sigma):
        token, before, position = self.tables
        logits = token[ids] + before[ids.roll(1, 1)] + position
        others = torch.cat([logits[..., : self.mask_id], logits[..., self.mask_id + 1 :]], dim=-1)
        logits[..., self.mask_id] = others.logsumexp(-1)
        return logits


class Forced:
    """Uniform numbers with which a chain goes through given states."""

    def __init__(self, process, network, states):
        self.process, self.network, self.states = process, network, [torch.tensor(ids) for ids in states]

    def uniform(self, *shape):
        now, after = self.states[:2]
        law = self.process.log_probs(self.network(now, None), now).exp()
        below = law.cumsum(-1) - law / 2
        self.states.pop(0)
        chance = torch.where(now == after, 1 - 1e-12, 0.0).double()
        return torch.stack([chance, below.gather(-1, after[..., None])[..., 0]], dim=1)


# ------------------------------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("case", GOLDEN["sdtt"], ids=["two steps", "three steps"])
def test_targets_and_losses_of_sdtt_are_those_of_its_code(case, monkeypatch):
    process, x_t = MaskedDiffusion(7, case["mask_id"]), torch.tensor(case["x_t"])
    student, teacher = Tables(case["student"], case["mask_id"]), Tables(case["teacher"], case["mask_id"]).eval()
    config = {"inner_steps": case["inner_steps"], "teacher_steps": case["teacher_steps"], "inner_times": "released"}
    forced = Forced(process, teacher, [case["x_t"], *case["states"]])
    monkeypatch.setattr(OwnChains, "noise", lambda self, ids: forced)
    t, predicted = numbers(case["t"]), process.predicted(x_t)
    corrupted = Corruption(x_t, predicted, t, process.sigma(t))
    for kind, expected in case["losses"].items():
        learn = build(SelfDistillation, process, teacher, **config, divergence=kind)
        # Its code rounds the times to float32 on the way to the network.
        torch.testing.assert_close(learn.inner_times(t), numbers(case["times"]), atol=1e-6, rtol=0)
        forced.states = [torch.tensor(ids) for ids in (case["x_t"], *case["states"])]
        target = learn.target(corrupted)
        log_q = process.log_probs(target[None], x_t[predicted][None])[0]
        torch.testing.assert_close(log_q, numbers(case["target"]), **EXACT)
        monkeypatch.setattr(learn, "lesson", lambda x0, found=(corrupted, target): found)
        torch.testing.assert_close(learn(student, x_t).loss, numbers(expected), **EXACT)


def test_paths_and_losses_of_dcd_are_those_of_its_code(monkeypatch):
    case = GOLDEN["dcd"]
    process, x0, whole = UniformDiffusion(case["V"]), torch.tensor(case["x0"]), numbers(case["noise"])
    own = whole.gather(-1, x0[..., None])[..., 0]
    largest, other = whole.scatter(-1, x0[..., None], -torch.inf).max(dim=-1)
    monkeypatch.setattr(ArgmaxNoise, "draw", lambda *_: ArgmaxNoise(own, largest, other))
    asked = []

    def teacher(ids, sigma):
        asked.append(ids)
        return numbers(case["teacher"])

    for kind, expected in case["losses"].items():
        settings = {"gamma_min": case["gamma"][0], "gamma_max": case["gamma"][1], "divergence": kind}
        learn = build(ConsistencyDistillation, process, torch.nn.Identity(), **settings)
        learn.teach, learn.times = teacher, lambda x0, smallest: numbers(case["drawn"])
        assert [learn.step for learn.round in range(5)] == [2**n / 512 for n in range(5)]
        assert case["dt"] == [[step, 2 ** (step // 10_000) / 512] for step, _ in case["dt"]]
        late, _ = learn.lesson(x0)
        assert torch.equal(late.x_t, torch.tensor(case["x_t"])) and torch.equal(asked[-1], torch.tensor(case["x_s"]))
        torch.testing.assert_close(learn.duality.gamma(late.t), numbers(case["gamma_t"]), **EXACT)
        loss = learn(lambda ids, sigma: numbers(case["student"]), x0).loss
        torch.testing.assert_close(loss, numbers(expected).mean(), **EXACT)


# ------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("kind", ["masked", "uniform"])
@pytest.mark.parametrize("times", ["even", "released"])
def test_with_one_step_the_target_is_the_prediction_of_the_teacher(kind, times):
    process = LANGUAGE.process(kind)
    learn = build(SelfDistillation, process, small_model(process), inner_steps=1, teacher_steps=1, inner_times=times)
    corrupted, target = learn.lesson(LANGUAGE.sample(8, seed=0))
    own = learn.teacher(corrupted.x_t, corrupted.sigma)[corrupted.predicted]
    torch.testing.assert_close(target, own, rtol=0, atol=1e-6)


@ALL
@pytest.mark.parametrize("measure", DIVERGENCES)
def test_a_student_that_is_the_teacher_has_no_loss_for_a_vanishing_step(kind, method, measure):
    process = LANGUAGE.process(kind)
    model = small_model(process).double()
    learn = build(method, process, model, teacher_steps=10**9, divergence=measure)
    learn.teacher.double()
    loss = learn(model, LANGUAGE.sample(8, seed=0)).loss
    assert loss.item() == pytest.approx(0, abs=1e-9)
    gradients = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    assert all(gradient.abs().max() < 1e-8 for gradient in gradients if gradient is not None and measure != "l1")


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        *(("masked", each) for each in DIVERGENCES),
        ("uniform", DIVERGENCES[0]),
        *(pytest.param("uniform", each, marks=pytest.mark.slow) for each in DIVERGENCES[1:]),
    ],
)
def test_the_gradient_is_that_of_the_divergence(kind, measure, monkeypatch):
    monkeypatch.setattr("tokendrift.training.objectives.rounds.ELEMENTS", {"cpu": 20})  # a few rows at a time
    process = LANGUAGE.process(kind)
    learn = build(SelfDistillation, process, small_model(process), divergence=measure, teacher_steps=4)
    lesson = learn.lesson(LANGUAGE.sample(1, seed=0))
    learn.lesson = lambda x0: (lesson[0], lesson[1].double())
    logits = torch.randn(1, 8, process.vocab_size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: learn(lambda ids, sigma: x, lesson[0].x_t).loss, logits)


def test_the_best_student_is_one_or_the_other_mean_of_the_targets():
    targets = torch.randn(5, 7, dtype=torch.float64).log_softmax(-1)
    means = {
        "kl_teacher_student": targets.exp().mean(0),
        "kl_student_teacher": targets.mean(0).softmax(-1),
    }
    for kind, best in means.items():
        log_p = best.log().requires_grad_()
        found = divergence(log_p.log_softmax(-1).expand(5, -1), targets, kind).mean()
        (slope,) = torch.autograd.grad(found, log_p)
        assert slope.abs().max() < 1e-12
    entropy = {kind: torch.special.entr(best).sum() for kind, best in means.items()}
    assert entropy["kl_student_teacher"] < entropy["kl_teacher_student"]


def test_the_mean_target_is_the_law_of_the_token_that_the_chain_of_the_teacher_writes():
    """From pairs of masks in two steps: a token is drawn beside the other one, or given it."""
    process, shape = MaskedDiffusion(4, 3), (4, 10_000)
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    class Other(torch.nn.Module):
        def forward(self, ids, sigma):
            return table[ids.unflatten(1, (-1, 2)).flip(2).flatten(1)]

    learn = build(SelfDistillation, process, Other(), teacher_steps=2, fewest_steps=1)
    masks, t = torch.full(shape, 3), torch.ones(4)
    target = learn.target(Corruption(masks, masks == 3, t, process.sigma(t)))
    law = process.log_probs(target[None], masks.flatten()[None]).exp()[0].mean(0)
    blind, given = table[3, :3].softmax(-1), table[:3, :3].softmax(-1)
    # Half of the positions are drawn in the first step, blindly; of the rest, half see the other token of their pair.
    expected = blind / 2 + (blind / 2 + blind @ given / 2) / 2
    torch.testing.assert_close(law[:3], expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("size", [7, 500])
def test_one_noise_gives_the_uniform_state_law_at_every_time_along_one_path(size):
    duality = ConsistencyDistillationConfig().duality(size)
    x0 = torch.full((2, 20_000), size - 2)
    noise = ArgmaxNoise.draw(x0, size, torch.Generator().manual_seed(0))
    t = torch.tensor([0.4, 0.6], dtype=torch.float64)
    late = noise.ids(x0, duality.gamma(t))
    early = noise.ids(x0, duality.gamma(t - 0.2))
    kept = duality.alpha(t) + (1 - duality.alpha(t)) / size
    torch.testing.assert_close((late == x0).double().mean(1), kept, atol=0.015, rtol=0)
    others = late[late != x0].bincount(minlength=size).double()
    assert others[size - 2] == 0 and others.max() < 2 * others.mean() + 20
    assert torch.equal(torch.where(early != late, early, x0), x0)


def test_the_range_of_noise_has_the_published_signal_levels_in_any_vocabulary():
    config = ConsistencyDistillationConfig()
    published, small = GaussianDuality(50_258, -4.0, -1.0), config.duality(100)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(small.alpha(ends), published.alpha(ends))
    same = config.duality(50_258)
    assert (same.gamma_min, same.gamma_max) == pytest.approx((-4.0, -1.0))


# ------------------------------------------------------------------------------------------- rounds, ranks, state


def test_after_each_round_the_teacher_is_the_student_and_its_step_grows_until_the_last():
    process = LANGUAGE.process("masked")
    learn = build(SelfDistillation, process, small_model(process), teacher_steps=32, fewest_steps=8, round_steps=2)
    student, seen = small_model(process, 1), []

    def on_step(finished):
        seen.append((learn.round, learn.steps))
        same = all(torch.equal(a, b) for a, b in zip(learn.teacher.parameters(), student.parameters(), strict=True))
        assert same == (finished in (2, 4))

    train(student, learn, iter(lambda: LANGUAGE.sample(4, seed=0), None), LoopConfig(6), on_step=on_step)
    assert seen == [(0, 32), (1, 16), (1, 16), (2, 8), (2, 8), (2, 8)]
    assert learn.step == pytest.approx(1 / 8, rel=1e-4)


def test_the_teacher_takes_the_averaged_weights_if_asked():
    process = LANGUAGE.process("uniform")
    learn = build(
        ConsistencyDistillation, process, small_model(process), teacher_average=True, round_steps=2, teacher_steps=4
    )
    student = small_model(process, 1)
    train(student, learn, iter(lambda: LANGUAGE.sample(4, seed=0), None), LoopConfig(2))
    assert all(torch.equal(a, b) for a, b in zip(learn.teacher.parameters(), student.parameters(), strict=True))


def test_a_round_of_a_partly_frozen_student_gives_the_teacher_all_its_weights():
    process = LANGUAGE.process("masked")
    learn = build(SelfDistillation, process, small_model(process), round_steps=1)
    student = small_model(process, 1)
    student.vocab_embed.requires_grad_(False)
    train(student, learn, iter(lambda: LANGUAGE.sample(4, seed=0), None), LoopConfig(1, ema=0.0))
    assert all(torch.equal(a, b) for a, b in zip(learn.teacher.parameters(), student.parameters(), strict=True))


def test_an_average_that_training_does_not_keep_is_refused_at_the_first_step():
    process = LANGUAGE.process("masked")
    learn = build(SelfDistillation, process, small_model(process), teacher_average=True)
    with pytest.raises(TokenDriftError, match=r"(?s)teacher_average is True, but .* no average .*Set ema above 0"):
        train(small_model(process), learn, iter([LANGUAGE.sample(4, seed=0)]), LoopConfig(1, ema=0.0))


@ALL
def test_two_processes_learn_what_one_learns_from_all_rows(kind, method):
    process, x0 = LANGUAGE.process(kind), LANGUAGE.sample(8, seed=0)
    whole, *parts = (
        build(method, process, small_model(process), share=share, teacher_steps=4).lesson(x0[rows])
        for share, rows in (((0, 1), slice(0, 8)), ((0, 2), slice(0, 4)), ((1, 2), slice(4, 8)))
    )
    both = (*map(torch.cat, zip(*(corrupted for corrupted, _ in parts), strict=True)), torch.cat([y for _, y in parts]))
    for one, two in zip((*whole[0], whole[1]), both, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@ALL
def test_its_state_restores_teacher_round_and_random_numbers(kind, method):
    process, x0 = LANGUAGE.process(kind), LANGUAGE.sample(4, seed=0)
    student = small_model(process, 1)
    learn = build(method, process, small_model(process))
    learn(student, x0)
    learn.next_round(student.parameters())
    state = copy.deepcopy(learn.state_dict())
    again = build(method, process, small_model(process, 2))
    again.load_state_dict(state)
    assert again.round == 1 and torch.equal(again(student, x0).loss, learn(student, x0).loss)


# ------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("preset", ["sdtt-owt", "dcd-owt", "idlm", "d-mmd"])
def test_a_step_costs_the_passes_that_the_page_says(preset):
    process = LANGUAGE.process("uniform" if preset.startswith("dcd") else "masked")
    base, counted = small_model(process), ([], [])
    objective = make_config(preset=preset, values={"checkpoint": "base", "random_input": 0}).objective
    learn = objective.build(ObjectiveSetup(base, process, LANGUAGE.length, torch.Generator().manual_seed(0)))
    student = small_model(process, 1)
    networks = [student, *(module for module in learn.module.modules() if isinstance(module, DiT))]
    for network in networks:
        network.output_layer.register_forward_hook(lambda *found: counted[found[-1].requires_grad].append(found[0]))
    learn(student, LANGUAGE.sample(8, seed=0)).loss.backward()
    if hasattr(learn, "update_auxiliary"):
        learn.update_auxiliary()
    (row,) = re.findall(rf"\| `{preset}` \| (\d) \| (\d) \| (\d) \|", PAGE)
    assert (len(networks), len(counted[0]), len(counted[1])) == tuple(map(int, row))


def test_the_loop_of_the_page_runs():
    (loop,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    process = LANGUAGE.process("masked")
    scope = {"process": process, "model": small_model(process), "batches": [LANGUAGE.sample(4, seed=0)] * 2}
    exec(loop.replace("round_steps=100", "round_steps=1"), scope)
    assert scope["distillation"].round == 2


# ------------------------------------------------------------------------------------------- input rules


def test_parts_that_do_not_belong_together_are_refused():
    process = LANGUAGE.process("masked")
    model = small_model(process)
    with pytest.raises(TokenDriftError, match="teacher must be frozen"):
        SelfDistillation(process, model)
    with pytest.raises(TokenDriftError, match=r"needs a uniform-state model, but this one is masked"):
        ConsistencyDistillation(process, frozen(model))
    with pytest.raises(TokenDriftError, match=r"drift is missing, but drift_weight is 0\.5"):
        build(SelfDistillation, process, model, drift_weight=0.5)
    with pytest.raises(TokenDriftError, match="one shape"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    for settings in ({"inner_steps": 0}, {"round_steps": 0}, {"divergence": "kl"}, {"drift_weight": -1.0}):
        with pytest.raises(TokenDriftError, match=next(iter(settings))):
            SelfDistillationConfig(**settings)
