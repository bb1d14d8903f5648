"""Laws of ancestral and analytic sampling: the posterior, written three ways."""

from __future__ import annotations

import pytest
import torch
from sampling_laws import (
    MASK,
    PROCESSES,
    Table,
    V,
    assert_samples_follow,
    chain_of,
    dense,
    final_law,
    kernels,
    law_of_x0,
    states,
)

from tokendrift import TokenDriftError
from tokendrift.diffusion import (
    Cosine,
    LogLinear,
    MaskedDiffusion,
    UniformDiffusion,
    network_log_score,
    score_posterior,
)
from tokendrift.sampling import Analytic, Ancestral

EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
EVERY_WAY = pytest.mark.parametrize("sampler", [Ancestral(), Analytic()])


def laws_of_fixture(golden, name, sampler, process, final):
    """Return the law of one step (B, L, V) for the rows of a fixture, each with its own times."""
    data = golden("transitions")
    logits, ids = data[f"{name}.logits"], data[f"{name}.x_t"]
    p, found = law_of_x0(process, logits), []
    for row, (t, s) in enumerate(zip(data[f"{name}.t"], data[f"{name}.s"], strict=True)):
        one = slice(row, row + 1)
        chain = chain_of(process, lambda x, sigma, one=one: logits[one], ids[one])
        times = [t.item(), 0.0 if final else s.item()]
        chain.times = lambda steps, times=times: times
        found.append(dense(process, next(iter(sampler(chain, 1))), p[one], ids[one]))
    return torch.cat(found)


@EVERY_WAY
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("mdlm", MaskedDiffusion), ("duo", UniformDiffusion)])
def test_one_step_has_the_published_law(golden, sampler, name, kind, final):
    data = golden("transitions")
    found = laws_of_fixture(golden, name, sampler, kind(11), final)
    data.assert_matches(found, f"{name}.posterior_final" if final else f"{name}.posterior")


@EVERY_WAY
@pytest.mark.parametrize("rule", ["ddpm", "ddpm_cache", "analytic"])
def test_masks_follow_all_three_published_rules(golden, sampler, rule):
    data = golden("transitions")
    weights, masked = data[f"mdlm.{rule}_weights"], data["mdlm.x_t"] == 10
    found = laws_of_fixture(golden, "mdlm", sampler, MaskedDiffusion(11), final=False)
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(found[masked], expected[masked], rtol=1e-10, atol=1e-11)


@EVERY_PROCESS
@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(), LogLinear(eps=0.0), Cosine(eps=0.0)])
@pytest.mark.parametrize("end", [0.0, 1e-5])
def test_analytic_and_ancestral_steps_are_one_law(process, schedule, end):
    process = type(process)(V, schedule=schedule)
    pair = (kernels(process, sampler, Table(2), 2, 4, end=end) for sampler in (Ancestral(), Analytic()))
    for ancestral, analytic in zip(*pair, strict=True):
        torch.testing.assert_close(analytic, ancestral, rtol=0, atol=1e-12)
        torch.testing.assert_close(analytic.sum(1), torch.ones(V**2, dtype=torch.float64), rtol=0, atol=1e-12)


@EVERY_PROCESS
def test_a_step_is_tau_leaping_with_the_scores_of_the_denoiser(process):
    """The dense form as SEDD states it: exp(-dQ) on the scores, times the forward chance of the present token."""
    t, s, ids = 0.7, 0.4, states(1)
    p = law_of_x0(process, Table(1)(ids, None))[:, 0]
    now, then = (process.sigma(torch.tensor(x, dtype=torch.float64)) for x in (t, s))
    leap, eye = now - then, torch.eye(V, dtype=torch.float64)
    prior = torch.full((V, V), 1 / V, dtype=torch.float64) if process.mask_id is None else eye[MASK].expand(V, V)

    def forward(sigma):
        return torch.exp(-sigma) * eye + (1 - torch.exp(-sigma)) * prior  # from row to column

    here = eye[ids[:, 0]]
    marginal = p @ forward(now)
    score = marginal / (marginal * here).sum(1, keepdim=True)
    law = (score @ torch.linalg.inv(forward(leap))) * forward(leap)[:, ids[:, 0]].T
    chain = chain_of(process, Table(1), ids)
    chain.times = lambda steps: [t, s]
    found = dense(process, next(iter(Analytic()(chain, 1))), p[:, None], ids)[:, 0]
    rows = ids[:, 0] == MASK if process.mask_id is not None else torch.ones(V, dtype=torch.bool)
    torch.testing.assert_close(found[rows], law[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.7), (0.4, 0.3), (0.4, 0.0)])
def test_raw_scores_leave_the_mask_as_often_as_their_total_says(t, s):
    """The network's own scores, not normalised, in SEDD's dense analytic step."""
    process, ids, logits = PROCESSES["masked"], states(2), Table(2)(states(2), None)
    times = (torch.full((len(ids),), x, dtype=torch.float64) for x in (t, s))
    t_rows, s_rows = times
    log_s = network_log_score(process, logits, ids, process.sigma(t_rows))
    law = score_posterior(process, log_s, ids, t_rows, s_rows)
    chain = chain_of(process, lambda x, sigma: logits, ids)
    chain.times = lambda steps: [t, s]
    found = dense(process, next(iter(Analytic(raw_scores=True)(chain, 1))), law_of_x0(process, logits), ids)
    torch.testing.assert_close(found, law, rtol=0, atol=1e-12)
    assert not torch.allclose(found, process.posterior(logits, ids, t_rows, s_rows)) or s == 0


def test_raw_scores_of_uniform_models_are_refused():
    with pytest.raises(TokenDriftError, match="raw_scores belongs to masked models"):
        next(Analytic(raw_scores=True)(chain_of(PROCESSES["uniform"], Table(2), states(2)), 2))


@EVERY_PROCESS
@EVERY_WAY
@pytest.mark.parametrize("noise_removal", ["ancestral", "none"])
def test_samples_follow_the_exact_law(process, sampler, noise_removal):
    assert_samples_follow(process, sampler, noise_removal=noise_removal)


@pytest.mark.statistical
@EVERY_PROCESS
@EVERY_WAY
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_many_samples_of_length_three_follow_the_exact_law(process, sampler, steps):
    assert_samples_follow(process, sampler, steps=steps, length=3, rows=30_000)


@pytest.mark.statistical
@EVERY_PROCESS
@pytest.mark.parametrize(
    "shaping", [{"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.8}, {"top_p": 0.8, "nucleus": "drop"}]
)
def test_shaped_samples_follow_the_shaped_law(process, shaping):
    assert_samples_follow(process, None, rows=50_000, **shaping)


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()])
def test_masked_chains_of_independent_tokens_end_in_the_denoisers_law(schedule):
    process, logits = MaskedDiffusion(V, schedule=schedule), torch.randn(V, dtype=torch.float64)
    law = final_law(process, Ancestral(), lambda x, sigma: logits.expand(*x.shape, V), 1, steps=4)
    torch.testing.assert_close(law, law_of_x0(process, logits[None, None])[0, 0], rtol=0, atol=1e-12)
