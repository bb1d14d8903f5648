"""Laws of remasking: ReMDM's formulas, as psi-steps with the matching kappa."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_laws import MASK, PROCESSES, Table, V, assert_samples_follow, chain_of, dense, law_of_x0, states

from tokendrift import TokenDriftError
from tokendrift.diffusion import LogLinear, MaskedDiffusion
from tokendrift.sampling import Psi, ReMDM, psi_step, remasking_kappa, remdm_loop, sample

MASKED = PROCESSES["masked"]


def published_law(p, ids, sigma, t, s):
    """ReMDM as its paper states it: (B, L, V) for a chance sigma of going back to the mask, a number or (B, L)."""
    alpha_t, alpha_s = MASKED.levels(t, s)
    mask, here = (torch.nn.functional.one_hot(x, V).double() for x in (torch.full_like(ids, MASK), ids))
    sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(ids.shape)[..., None]
    standing = (1 - sigma) * here + sigma * mask
    hidden = (p * (alpha_s - (1 - sigma) * alpha_t) + mask * (1 - alpha_s - sigma * alpha_t)) / (1 - alpha_t)
    return torch.where((ids == MASK)[..., None], hidden, standing)


times = st.floats(1e-3, 1).flatmap(lambda t: st.tuples(st.just(t), st.floats(0, 1).map(lambda share: share * t)))


@given(times, st.floats(0, 1), st.sampled_from(["cap", "rescale"]))
def test_remasking_is_a_psi_step_with_the_matching_kappa(pair, eta, rule):
    (t, s), ids = pair, states(2)
    alpha_t, alpha_s = MASKED.levels(t, s)
    most = (1 - alpha_s) / alpha_t
    sigma = min(eta, most) if rule == "cap" else eta * min(1.0, most)
    chain = chain_of(MASKED, Table(2), ids)
    p = law_of_x0(MASKED, Table(2)(ids, None))
    found = dense(MASKED, psi_step(chain, t, s, remasking_kappa(MASKED, rule, eta, t, s)), p, ids)
    torch.testing.assert_close(found, published_law(p, ids, sigma, t, s), rtol=0, atol=1e-12)


def test_confident_tokens_stay_longer():
    t, s, ids = 0.6, 0.4, torch.tensor([[0, 1, MASK, 2], [MASK] * 4, [3, 3, 3, 3]])
    chain = chain_of(MASKED, Table(4), ids)
    chain.drawn_log_p = torch.tensor([[0.9, 0.1, 1.0, 0.5], [1.0] * 4, [0.2] * 4], dtype=torch.float64).log()
    chain.free[2, 0] = False  # given: never remasked, and no part of the shares
    chain.times = lambda steps: [t, s]
    weight = torch.tensor([[-0.9, -0.1, -9e9, -0.5], [-9e9] * 4, [-9e9, -0.2, -0.2, -0.2]], dtype=torch.float64)
    sigma = min(1.0, 0.4 * 0.999 / (1 - 0.6 * 0.999)) * weight.softmax(-1)
    sigma[1] = 0
    p = law_of_x0(MASKED, Table(4)(ids, None))
    found = dense(MASKED, next(iter(ReMDM("conf")(chain, 1))), p, ids)
    # The largest sigma is that of the formula with 1 - alpha_s = 0.4 * 0.999 and alpha_t = 1 - 0.6 * 0.999.
    torch.testing.assert_close(found, published_law(p, ids, sigma, t, s), rtol=0, atol=1e-12)


def test_the_confidence_is_that_of_the_moment_of_the_draw():
    seen = []

    def spy(chain, steps):
        for law in ReMDM("conf")(chain, steps):
            seen.append((chain.ids, chain.drawn_log_p.clone()))
            yield law

    logits = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample(lambda x, sigma: logits.expand(*x.shape, V), MASKED, (50, 6), steps=6, sampler=spy, seed=0)
    log_p = law_of_x0(MASKED, logits[None, None])[0, 0].log()
    remasked = 0
    for (ids, drawn), (later, _) in itertools.pairwise(seen):
        there = ids != MASK
        torch.testing.assert_close(drawn[there], log_p[ids[there]], rtol=0, atol=1e-12)
        remasked += (there & (later == MASK)).sum().item()
    assert remasked > 0


@pytest.mark.parametrize("sampler", [ReMDM("cap", 0.3), ReMDM("rescale", 0.5), remdm_loop(0.2)])
def test_samples_follow_the_exact_law(sampler):
    assert_samples_follow(MASKED, sampler, steps=6)


@pytest.mark.parametrize("sampler", [ReMDM("cap", 0.3), ReMDM("rescale", 0.5), remdm_loop(0.3)])
def test_remasking_leaves_independent_tokens_their_law(sampler):
    """Where p does not depend on the other tokens, taking back and drawing again changes nothing."""
    from sampling_laws import final_law

    logits = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    law = final_law(MASKED, sampler, lambda x, sigma: logits.expand(*x.shape, V), 1, steps=8)
    torch.testing.assert_close(law, law_of_x0(MASKED, logits[None, None])[0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["cap", "rescale"])
def test_a_schedule_may_leave_no_signal_at_the_end(rule):
    assert_samples_follow(MaskedDiffusion(V, schedule=LogLinear(eps=0.0)), ReMDM(rule, 0.3), steps=4)


def test_remasking_by_confidence_begins_where_nothing_stands():
    found = sample(Table(3), MaskedDiffusion(V, schedule=LogLinear(eps=0.0)), (9, 3), steps=4, sampler=ReMDM("conf"))
    assert not (found.ids == MASK).any()


def test_the_loop_is_the_published_profile():
    loop = remdm_loop(0.01)
    assert loop == Psi(
        middle="max-capped-0.01", high_frac=0.45, middle_frac=0.5, profile="linear-constant-linear-0.9-inv"
    )
    assert remdm_loop(1e-5).middle == "max-capped-1e-05"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 2.0}, r"eta must lie in \[0, 1\]: it is a probability"),
        ({"t_on": 0.1, "t_off": 0.5}, "t_on and t_off must be shares of the steps, t_off at most t_on"),
        ({"alpha_on": 1.0}, "alpha_on must lie between 0 and 1"),
    ],
)
def test_bad_options_of_the_loop_are_named(options, message):
    with pytest.raises(TokenDriftError, match=message):
        remdm_loop(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rule": "loop"}, "rule must be one of 'cap', 'rescale', 'conf'"), ({"eta": 1.5}, r"eta must lie in \[0, 1\]")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(TokenDriftError, match=message):
        ReMDM(**options)


def test_uniform_state_models_have_no_mask_to_go_back_to():
    with pytest.raises(TokenDriftError, match="requires a masked process"):
        sample(Table(2), PROCESSES["uniform"], (2, 2), steps=2, sampler=ReMDM())
