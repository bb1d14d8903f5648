"""Training on the model's own chains: where they stop, what is asked there, and that it helps where it should."""

from __future__ import annotations

import pytest
import torch

from tokendrift import PairDriftLoss, TokenDriftError, TokenDriftLoss
from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.features import IdentityFeatures
from tokendrift.markov import ExactDenoiser, MarkovLanguage, few_step
from tokendrift.models import DiT, DiTConfig
from tokendrift.training import Continuation, LoopConfig, Optimization, OwnTrajectories, chain_positions, train

LANGUAGE = MarkovLanguage.random(words=6, successors=2, length=8, seed=0)


class Recorded(torch.nn.Module):
    """The exact denoiser with a parameter, that remembers what it was asked."""

    def __init__(self, process):
        super().__init__()
        self.exact, self.process = ExactDenoiser(LANGUAGE, process), process
        self.bias = torch.nn.Parameter(torch.zeros(process.vocab_size))
        self.asked = []

    def forward(self, ids, sigma):
        self.asked.append((ids.clone(), sigma.clone(), torch.is_grad_enabled()))
        return self.exact(ids, sigma).clamp_min(-50) + self.bias


def objective(process, steps, **options):
    drift = PairDriftLoss(process.vocab_size, strata=len(chain_positions(process, steps)), mask_id=process.mask_id)
    return OwnTrajectories(process, drift, steps, generator=torch.Generator().manual_seed(0), **options)


def test_positions_are_the_inputs_of_every_call_but_for_the_all_masked_one():
    uniform, masked = UniformDiffusion(6), MaskedDiffusion(7)
    assert chain_positions(uniform, (2, 4)) == ((4, 0), (2, 1), (4, 1), (4, 2), (4, 3))
    assert chain_positions(masked, (4, 2)) == ((2, 1), (4, 1), (4, 2), (4, 3))
    assert chain_positions(uniform, (1,)) == ((1, 0),)
    with pytest.raises(TokenDriftError, match="steps"):
        chain_positions(masked, (1,))
    with pytest.raises(TokenDriftError, match="steps"):
        chain_positions(uniform, ())


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_the_gradient_is_taken_at_one_position_of_a_chain_at_its_time(kind):
    process = LANGUAGE.process(kind)
    learn, model = objective(process, (4,)), Recorded(LANGUAGE.process(kind))
    for _ in range(6):
        model.asked.clear()
        learn(model, LANGUAGE.sample(16, seed=0)).loss.backward()
        *chain, (ids, sigma, gradient) = model.asked
        assert gradient and not any(grad for _, _, grad in chain)
        taken = len(chain)
        assert taken <= 3
        torch.testing.assert_close(sigma, process.sigma(torch.full((16,), 1 - taken / 4)))
        if kind == "masked":
            hidden = (ids == process.mask_id).float().mean().item()
            assert taken >= 1 and hidden == pytest.approx(1 - taken / 4, abs=0.2)
    assert model.training


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_the_last_position_of_a_chain_gives_the_law_of_what_the_sampler_writes(kind):
    """One-shot completions after 1 of 2 steps are the samples of 2 steps: the pairs agree up to chance."""
    process = LANGUAGE.process(kind)
    learn, model = objective(process, (2,)), Recorded(process)
    learn.drift.decay = 0.98
    for _ in range(25 * len(learn.positions)):
        learn(model, LANGUAGE.sample(256, seed=0))
    sampled = few_step(LANGUAGE, model, process, steps=(2,), samples=5_000, seed=1).rows[0].measures
    words = LANGUAGE.words
    law = learn.drift.generated[-1, 0, :words, :words].double()
    assert law[LANGUAGE.allowed].sum().item() == pytest.approx(sampled.validity.estimate, abs=0.01)
    distance = (law - LANGUAGE.pairs).abs().sum().item() / 2
    assert distance == pytest.approx(sampled.total_variation.estimate, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_completions_of_uniform_states_are_the_posterior_of_the_last_step(dtype):
    process = LANGUAGE.process("uniform")
    generator = torch.Generator().manual_seed(0)
    x_t, times = torch.randint(6, (4, 8), generator=generator), torch.tensor([1.0, 0.75, 0.5, 0.25])
    logits = torch.randn(4, 8, 6, generator=generator).to(dtype)
    law = process.completion_logits(logits, x_t, times).softmax(dim=-1)
    torch.testing.assert_close(law, process.posterior(logits.float(), x_t, times, torch.zeros(4)))


def test_same_generator_same_losses():
    process = LANGUAGE.process("uniform")
    runs = [
        [
            objective(process, (2, 4), base_weight=0.1)(Recorded(process), LANGUAGE.sample(8, seed=s)).loss
            for s in (0, 1)
        ]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_an_encoder_loss_works_there_too():
    process = LANGUAGE.process("uniform")
    drift = TokenDriftLoss(torch.eye(6), IdentityFeatures(), queue_size=32)
    learn = OwnTrajectories(process, drift, (2,), generator=torch.Generator().manual_seed(0))
    model = Recorded(process)
    found = learn(model, LANGUAGE.sample(16, seed=0), log=True)
    found.loss.backward()
    assert model.bias.grad.abs().sum() > 0 and set(found.logs) == {"drift"}


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_processes_draw_the_chains_that_one_draws(kind):
    process, x0 = LANGUAGE.process(kind), LANGUAGE.sample(8, seed=0)
    found = [
        objective(process, (4,), share=share).chains.inputs(Recorded(process), rows, 4, 3)
        for share, rows in (((0, 1), x0), ((0, 2), x0[:4]), ((1, 2), x0[4:]))
    ]
    assert torch.equal(found[0], torch.cat(found[1:]))


def test_processes_call_the_network_equally_often_though_nobody_moves():
    process = LANGUAGE.process("masked")
    learn, model = objective(process, (50,), share=(1, 2)), Recorded(process)
    learn.chains.inputs(model, LANGUAGE.sample(1, seed=0), 50, 20)
    assert len(model.asked) == 20


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_chains_are_drawn_without_dropout_and_the_gradient_with_it(autocast):
    process, modes = LANGUAGE.process("uniform"), []
    sizes = DiTConfig(process.vocab_size, 8, hidden_dim=16, cond_dim=4, n_blocks=1, n_heads=2)
    model = DiT(sizes)
    model.blocks[0].register_forward_pre_hook(lambda block, _: modes.append(block.training))
    optimization = Optimization(model, LoopConfig(1, batch_size=8), autocast=autocast)
    learn = objective(process, (4,))
    learn.positions = ((4, 2),)
    optimization.step(0, learn, [LANGUAGE.sample(8, seed=0)])
    assert modes == [False, False, True]


def test_corrupted_real_text_can_stand_in_for_the_chains():
    process = LANGUAGE.process("uniform")
    learn, model = objective(process, (4,), own=False), Recorded(process)
    learn(model, LANGUAGE.sample(16, seed=0))
    assert len(model.asked) == 1


def test_one_law_can_serve_all_positions():
    process = LANGUAGE.process("uniform")
    drift = PairDriftLoss(6)
    learn = OwnTrajectories(process, drift, (4,), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        learn(Recorded(process), LANGUAGE.sample(16, seed=0))
    assert drift.generated_weight.tolist() == [5]


def test_strata_must_fit_the_chains():
    process = LANGUAGE.process("uniform")
    with pytest.raises(TokenDriftError, match="strata"):
        OwnTrajectories(process, PairDriftLoss(6, strata=2), (4,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_it_beats_the_continuation_at_every_temperature(kind):
    """What few steps break on a known language is repaired beyond what temperature can do, at the right entropy."""
    process = LANGUAGE.process(kind)
    torch.manual_seed(0)
    sizes = DiTConfig(process.vocab_size, 8, hidden_dim=32, cond_dim=16, n_blocks=2, n_heads=2, dropout=0.0)
    base = DiT(sizes)
    base_loop = LoopConfig(1500, batch_size=128, learning_rate=3e-3, warmup=100, ema=0.995)
    train(base, Continuation(process, torch.Generator().manual_seed(1)), LANGUAGE.batches(128, seed=2), base_loop)
    refined = DiT(sizes)
    refined.load_state_dict(base.state_dict())
    loop = LoopConfig(600, batch_size=64, learning_rate=1e-3, warmup=30)
    # Without the base loss nothing holds the masked model's first step, which is no position of these chains.
    train(refined, objective(process, (2, 4), base_weight=0.1), LANGUAGE.batches(64, seed=3), loop)
    cooled = few_step(LANGUAGE, base, process, steps=(4,), temperatures=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4))
    ours = few_step(LANGUAGE, refined, process, steps=(4,)).rows[0].measures
    assert ours.total_variation.high < cooled.best(4).measures.total_variation.low
    assert ours.unigram_entropy == pytest.approx(LANGUAGE.unigram_entropy, abs=0.05)
