"""Training: fixed order, matched arms, averaged weights, honest failure."""

import itertools

import pytest
import torch

from tokendrift import MirrorTeacherLoss, TokenDriftError, TokenDriftLoss
from tokendrift.diffusion import Corruption, MaskedDiffusion, UniformDiffusion
from tokendrift.evaluation import validation_nelbo
from tokendrift.models import DiT, DiTConfig
from tokendrift.training import (
    Continuation,
    Denoising,
    Drift,
    LoopConfig,
    Optimization,
    StepLoss,
    train,
    windows,
)
from tokendrift.training.objectives.objective import corrupt_rows

VOCAB = 12


def tiny(seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    return DiT(
        DiTConfig(VOCAB, 8, hidden_dim=16, cond_dim=4, n_blocks=1, n_heads=2, dropout=0.0, time_conditioning=True)
    )


def stream() -> torch.Tensor:
    return torch.arange(200) % (VOCAB - 2)  # a language with one successor each: learnable in a few steps


def test_windows_come_from_the_stream_in_an_order_fixed_by_the_seed():
    first, again, other = (next(windows(stream(), 8, 5, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal((first[:, 1:] - first[:, :-1]) % (VOCAB - 2), torch.ones(5, 7, dtype=torch.int64))


def test_windows_refuse_a_stream_shorter_than_one_window():
    with pytest.raises(TokenDriftError, match="7 tokens, too few for windows of 8"):
        next(windows(torch.arange(7), 8, 2, seed=0))


@pytest.mark.parametrize(
    ("process", "objective", "steps"),
    [
        pytest.param(MaskedDiffusion(VOCAB), Continuation, 240, marks=pytest.mark.slow),
        (MaskedDiffusion(VOCAB), Denoising, 120),
        (UniformDiffusion(VOCAB), Continuation, 240),
    ],
    ids=["masked NELBO", "masked cross-entropy", "uniform NELBO"],
)
def test_training_lowers_the_validation_nelbo_below_unigrams(process, objective, steps):
    model, held_out = tiny(), next(windows(stream(), 8, 64, seed=9))
    before = validation_nelbo(model, process, held_out)
    config = LoopConfig(steps, batch_size=32, learning_rate=1e-2, warmup=5, log_every=10)
    records = train(
        model, objective(process, torch.Generator().manual_seed(0)), windows(stream(), 8, 32, seed=1), config
    )
    after = validation_nelbo(model, process, held_out)
    assert after < before and after < 0.8 * torch.tensor(VOCAB - 2.0).log()
    assert [int(record["step"]) for record in records] == [*range(0, steps, 10), steps - 1]
    assert not model.training


@pytest.mark.parametrize("objective", [Denoising, Continuation])
def test_every_objective_of_a_uniform_state_model_has_one_minimiser(objective):
    # Of one token with a known law the best prediction from no other token is that law, whatever the noisy token is.
    process, law, t = UniformDiffusion(3), torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.4]).double()
    logits = law.log().repeat(3, 1).requires_grad_()
    alpha, loss = process.schedule.alpha(t), 0.0
    for clean, noisy in itertools.product(range(3), range(3)):
        x0, x_t = torch.tensor([[clean]]), torch.tensor([[noisy]])
        corrupted = Corruption(x_t, process.predicted(x_t), t, process.sigma(t))
        chance = law[clean] * (alpha * (clean == noisy) + (1 - alpha) / 3)
        loss = loss + chance * objective(process).loss(logits[x_t], x0, corrupted)
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(slope, torch.zeros(3, 3).double(), rtol=0, atol=1e-12)


def test_the_same_seeds_give_the_same_weights():
    def run() -> DiT:
        model = tiny()
        drift = TokenDriftLoss.from_encoder(model, queue_size=16)
        objective = Drift(UniformDiffusion(VOCAB), drift, 0.1, torch.Generator().manual_seed(3))
        train(model, objective, windows(stream(), 8, 4, seed=1), LoopConfig(4, batch_size=4, warmup=1))
        return model

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_both_arms_see_the_same_corruption():
    seen = []

    class Recording(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, x_t, sigma):
            seen.append((x_t, sigma))
            return self.inner(x_t, sigma)

    process, model = UniformDiffusion(VOCAB), Recording()
    drift = TokenDriftLoss.from_encoder(model.inner, queue_size=0)
    for objective in (
        Continuation(process, torch.Generator().manual_seed(5)),
        Drift(process, drift, generator=torch.Generator().manual_seed(5)),
    ):
        for batch in itertools.islice(windows(stream(), 8, 3, seed=1), 2):
            objective(model, batch)
    for (x_first, sigma_first), (x_second, sigma_second) in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(x_first, x_second) and torch.equal(sigma_first, sigma_second)


def test_drift_logs_its_diagnostics_only_when_asked():
    model = tiny()
    objective = Drift(MaskedDiffusion(VOCAB), TokenDriftLoss.from_encoder(model, mask_id=VOCAB - 1), 0.5)
    batch = next(windows(stream(), 8, 4, seed=1))
    logs = objective(model, batch, log=True).logs
    assert {"token_entropy", "queue", "raw_drift_rms", "drift", "nelbo"} <= logs.keys()
    for name in ("raw_drift_rms", "positive_mass", "effective_references", "pair_weight"):
        assert {f"{name}/0.02", f"{name}/0.05", f"{name}/0.2"} <= logs.keys()
    assert objective(model, batch).logs.keys() == {"drift", "nelbo"}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("process", [MaskedDiffusion(VOCAB), UniformDiffusion(VOCAB)], ids=["masked", "uniform"])
def test_drift_without_logits_has_the_loss_the_gradients_and_the_logs_of_drift_with_them(process, log):
    found = []
    for hold in (True, False):
        model = tiny().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
        drift = TokenDriftLoss.from_encoder(model, mask_id=process.mask_id)
        objective = Drift(process, drift, generator=torch.Generator().manual_seed(2), hold_logits=hold)
        loss, logs = objective(model, next(windows(stream(), 8, 4, seed=1)), log=log)
        loss.backward()
        found.append((loss.detach(), logs, [parameter.grad for parameter in model.parameters()]))
    (loss, logs, gradients), (other, other_logs, expected) = found
    assert loss > 0 and list(logs) == list(other_logs)
    torch.testing.assert_close(other, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(list(other_logs.values()), list(logs.values()), rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(expected, gradients, rtol=1e-9, atol=1e-12)


def test_under_autocast_the_step_without_logits_is_close_to_the_one_with_them():
    found = []
    for hold in (True, False):
        model = tiny()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        drift = TokenDriftLoss.from_encoder(model)
        objective = Drift(UniformDiffusion(VOCAB), drift, generator=torch.Generator().manual_seed(2), hold_logits=hold)
        optimization = Optimization(model, LoopConfig(1, warmup=0), autocast=torch.bfloat16)
        found.append(optimization.step(0, objective, [next(windows(stream(), 8, 4, seed=1))], log=True))
    for name in ("drift", "grad_norm", "token_entropy"):
        assert found[1][name] == pytest.approx(found[0][name], rel=0.02)  # logits are rounded to 8 bits


@pytest.mark.parametrize(
    ("cls", "options", "weight", "reader"),
    [
        (TokenDriftLoss, {}, 0.5, "base_weight=0.5"),
        (TokenDriftLoss, {"lift": "straight_through"}, 0.0, "lift='straight_through'"),
        (MirrorTeacherLoss, {}, 0.0, "a mirror teacher"),
    ],
)
def test_drift_says_what_needs_the_logits(cls, options, weight, reader):
    drift = cls(torch.zeros(VOCAB, 4), lambda embeds: embeds.mean(dim=1), **options)
    with pytest.raises(TokenDriftError, match=f"hold_logits is False, but {reader} needs the logits"):
        Drift(UniformDiffusion(VOCAB), drift, weight, hold_logits=False)


def test_the_returned_weights_are_the_average_of_the_steps():
    def run(ema):
        model, trail = torch.nn.Linear(1, 1, bias=False), []
        model.weight.data.fill_(0.0)

        def objective(module, x0, /, *, log=False):
            trail.append(module.weight.item())
            loss = (module.weight - 3).square().sum()
            return StepLoss(loss, {"loss": loss.detach()})

        config = LoopConfig(3, learning_rate=0.5, warmup=1, ema=ema)
        train(model, objective, itertools.repeat(torch.zeros(1, 1)), config)
        return model.weight.item(), trail

    last, trail = run(ema=0.0)
    average = trail[0]
    for step, weight in enumerate([*trail[1:], last]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert run(ema=0.5)[0] == pytest.approx(average, rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.5, 1.0, 1.0, 1.0]), ("linear", [0.5, 1.0, 1.0, 0.5]), ("cosine", [0.5, 1.0, 1.0, 0.51])],
)
def test_the_rate_warms_up_and_then_follows_its_schedule(schedule, rates):
    config = LoopConfig(4, learning_rate=1.0, warmup=2, schedule=schedule)
    assert [config.rate(step) for step in range(4)] == pytest.approx(rates, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "sine"}, "schedule must be one of 'cosine', 'constant', 'linear'"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\)"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\); 0 keeps no average"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or above"),
    ],
)
def test_a_loop_that_cannot_work_is_refused(changes, message):
    with pytest.raises(TokenDriftError, match=message):
        LoopConfig(4, **changes)


def test_micro_batches_add_up_to_the_step_of_the_whole_batch():
    process, batch = MaskedDiffusion(VOCAB), next(windows(stream(), 8, 6, seed=1))
    corrupted = process.corrupt(batch, generator=torch.Generator().manual_seed(0))

    def objective(model, rows, /, *, log=False):
        own = slice(int(rows[0, 0]), int(rows[-1, 0]) + 1)
        x_t, t = corrupted.x_t[own], corrupted.t[own]
        loss = process.nelbo(model(x_t, corrupted.sigma[own]), batch[own], x_t, t).mean()
        return StepLoss(loss, {"nelbo": loss.detach()})

    def step(size):
        torch.manual_seed(0)
        optimization = Optimization(tiny(), LoopConfig(1, warmup=1))
        rows = torch.arange(6)[:, None].split(size)
        return optimization.step(0, objective, rows, count=len(rows), log=True)

    assert step(2) == pytest.approx(step(6), rel=1e-5)


def squares(model, rows, /, *, log=False):
    if rows[0, 0] < 0:
        raise TokenDriftError("a bad batch")
    return StepLoss((model(rows, torch.ones(len(rows))) - 1).square().mean(), {})


def test_a_step_after_one_that_failed_begins_without_its_gradients():
    def step(first):
        torch.manual_seed(0)
        optimization, rows = Optimization(tiny(), LoopConfig(1)), torch.ones(2, 8, dtype=torch.int64)
        for batches in first:
            with pytest.raises(TokenDriftError, match="a bad batch"):
                optimization.step(0, squares, batches, count=2)
        return optimization.step(0, squares, [rows, rows], count=2, log=True)

    assert step([[torch.zeros(2, 8, dtype=torch.int64), torch.full((2, 8), -1)]]) == step([])


@pytest.mark.parametrize("given", [0, 1, 3])
def test_another_number_of_micro_batches_than_stated_is_refused(given):
    optimization, rows = Optimization(tiny(), LoopConfig(1)), torch.ones(2, 8, dtype=torch.int64)
    before = optimization.state()["model"]
    with pytest.raises(TokenDriftError, match=f"given {given} micro-batches, but count is 2"):
        optimization.step(0, squares, [rows] * given, count=2)
    torch.testing.assert_close(optimization.state()["model"], before, rtol=0, atol=0)


def test_training_takes_any_batches_and_says_where_they_ended():
    rows = [torch.ones(2, 8, dtype=torch.int64)] * 2
    assert len(train(tiny(), squares, rows, LoopConfig(2, log_every=1))) == 2
    with pytest.raises(TokenDriftError, match="batches ended after 2 of 3 steps"):
        train(tiny(), squares, rows, LoopConfig(3))


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_a_stored_state_goes_on_bit_for_bit(ema):
    def run(steps, state=None):
        model = DiT(DiTConfig(VOCAB, 8, hidden_dim=16, cond_dim=4, n_blocks=1, n_heads=2, dropout=0.1))
        optimization = Optimization(model, LoopConfig(6, warmup=1, ema=ema, weight_decay=0.1))
        if state is not None:
            optimization.load_state(state)
        for step in steps:
            torch.manual_seed(step)
            objective = Continuation(MaskedDiffusion(VOCAB), torch.Generator().manual_seed(step))
            optimization.step(step, objective, [next(windows(stream(), 8, 4, seed=step))])
        return optimization.state()

    torch.manual_seed(0)
    whole = run(range(6))
    torch.manual_seed(0)
    first = run(range(3))
    torch.manual_seed(1)  # other initial weights: all must come from the state
    resumed = run(range(3, 6), first)
    assert whole.keys() == resumed.keys() == ({"model", "optimizer", "average"} if ema else {"model", "optimizer"})
    for group, tensors in whole.items():
        assert tensors.keys() == resumed[group].keys()
        assert all(torch.equal(tensor, resumed[group][name]) for name, tensor in tensors.items())


def test_autocast_is_for_the_network_alone_and_leaves_its_logits_narrow():
    seen = []

    def objective(model, rows, /, *, log=False):
        logits = model(rows, torch.zeros(len(rows)))
        seen.append((logits.dtype, (logits.float() @ torch.ones(VOCAB, 1)).dtype))
        loss = logits.float().square().mean()
        return StepLoss(loss, {"loss": loss.detach()})

    Optimization(tiny(), LoopConfig(1), autocast=torch.bfloat16).step(0, objective, [torch.zeros(2, 8).long()])
    assert seen == [(torch.bfloat16, torch.float32)]


def test_noise_of_a_rank_is_that_of_its_rows_in_the_whole_batch():
    process, batch = UniformDiffusion(VOCAB), next(windows(stream(), 8, 6, seed=1))
    whole = corrupt_rows(process, batch, generator=torch.Generator().manual_seed(3))
    for rank in range(3):
        rows = slice(2 * rank, 2 * rank + 2)
        own = corrupt_rows(process, batch[rows], generator=torch.Generator().manual_seed(3), share=(rank, 3))
        for field in ("x_t", "predicted", "t", "sigma"):
            assert torch.equal(getattr(own, field), getattr(whole, field)[rows])


def test_divergence_stops_with_the_step_and_a_remedy():
    model = tiny()
    model.output_layer.linear.bias.data.fill_(torch.inf)
    with pytest.raises(TokenDriftError, match=r"(?s)training diverged at step 0.*Lower the learning rate"):
        train(
            model, Continuation(UniformDiffusion(VOCAB)), windows(stream(), 8, 2, seed=0), LoopConfig(1, batch_size=2)
        )


def test_validation_is_repeatable_and_leaves_the_mode_alone():
    model, process, held_out = tiny().train(), UniformDiffusion(VOCAB), next(windows(stream(), 8, 7, seed=9))
    assert validation_nelbo(model, process, held_out) == validation_nelbo(model, process, held_out)
    assert model.training
