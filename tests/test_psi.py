"""Laws of psi-samplers: published mixtures, grids and kappas; marginals that do not depend on kappa."""

from __future__ import annotations

import pytest
import torch
from sampling_laws import PROCESSES, Table, V, assert_samples_follow, chain_of, dense, kernels, law_of_x0

from tokendrift import TokenDriftError
from tokendrift.diffusion import Cosine, LogLinear, MaskedDiffusion, UniformDiffusion
from tokendrift.sampling import Ancestral, Psi, psi_step, remasking_kappa

EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("mdlm", MaskedDiffusion), ("duo", UniformDiffusion)])
def test_one_step_has_the_published_law(golden, name, kind, corrector):
    data, process = golden("transitions"), kind(11)
    logits, ids, kappa = data[f"{name}.logits"], data[f"{name}.x_t"], data[f"psi.{name}.kappa"]
    p, found = law_of_x0(process, logits), []
    for row, (t, s) in enumerate(zip(data[f"{name}.t"], data[f"{name}.s"], strict=True)):
        one = slice(row, row + 1)
        chain = chain_of(process, lambda x, sigma, one=one: logits[one], ids[one])
        mixture = psi_step(chain, t.item(), s.item(), 0.0 if corrector else kappa[row].item())
        found.append(dense(process, mixture, p[one], ids[one]))
    data.assert_matches(torch.cat(found), f"psi.{name}.q_pc" if corrector else f"psi.{name}.mixture")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_grids_and_kappas_are_the_published_ones(golden, index):
    data = golden("transitions")
    params = data.params[f"profile{index}"]
    sampler = Psi(
        high=params["high_mode"],
        middle=params["middle_mode"],
        low=params["low_mode"],
        high_frac=params["high_frac"],
        middle_frac=params["middle_frac"],
        profile=params["time_profile"],
    )
    times = sampler.times(PROCESSES["uniform"], params["steps"])
    kappas = sampler.kappas(PROCESSES["uniform"], times)
    times, kappas = (torch.tensor(x, dtype=torch.float64) for x in (times, kappas))
    data.assert_matches(times, f"profile{index}.timesteps")
    data.assert_matches(kappas, f"profile{index}.kappas")
    data.assert_matches(times.float(), f"profile{index}.timesteps_float32", tolerance={"rtol": 1e-5, "atol": 1e-6})
    data.assert_matches(kappas.float(), f"profile{index}.kappas_float32", tolerance={"rtol": 1e-5, "atol": 1e-5})


@EVERY_PROCESS
def test_kappa_one_is_ancestral_sampling(process):
    for one, other in zip(*(kernels(process, s, Table(2), 2, 4) for s in (Psi(), Ancestral())), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@EVERY_PROCESS
@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.4), (0.4, 0.4), (0.3, 0.0)])
def test_with_the_true_posterior_marginals_are_kept_whatever_kappa_is(process, kappa, t, s):
    """One token of known law, and the network that knows it: from the marginal at t every step reaches that at s."""
    prior_law = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
    prior = torch.full((V,), 1 / V, dtype=torch.float64)
    if process.mask_id is not None:
        prior = torch.eye(V, dtype=torch.float64)[process.mask_id]

    def marginal(time):
        alpha, _ = process.levels(time, time) if time else (1.0, 1.0)
        return alpha * prior_law + (1 - alpha) * prior

    # The posterior of x_0 given x_t, which no fixed p gives in uniform diffusion: average the steps for each x_0.
    ids, reached = torch.arange(V)[:, None], torch.zeros(V, dtype=torch.float64)
    for token, weight in enumerate(prior_law.tolist()):
        logits = torch.full((V, 1, V), -torch.inf, dtype=torch.float64)
        logits[..., token] = 0.0
        if process.mask_id == token:
            continue
        chain = chain_of(process, lambda x, sigma, logits=logits: logits, ids)
        p = torch.eye(V, dtype=torch.float64)[token].expand(V, 1, V)
        kernel = dense(process, psi_step(chain, t, s, kappa), p, ids)[:, 0]
        alpha, _ = process.levels(t, t)
        start = alpha * torch.eye(V, dtype=torch.float64)[token] + (1 - alpha) * prior
        reached += weight * start @ kernel
    torch.testing.assert_close(reached, marginal(s), rtol=0, atol=1e-12)


@EVERY_PROCESS
@pytest.mark.parametrize("sampler", [Psi("pure-pc", "constant-0.5"), Psi(middle="constant-remdm-0.1")])
def test_samples_follow_the_exact_law(process, sampler):
    assert_samples_follow(process, sampler, steps=5)


@pytest.mark.statistical
@EVERY_PROCESS
@pytest.mark.parametrize("profile", ["linear", "linear-constant-linear-0.5", "linear-constant-linear-0.8-inv"])
@pytest.mark.parametrize("mode", ["pure-posterior", "pure-pc", "constant-0.5", "max-capped-0.2", "max-rescale-0.5"])
def test_every_mode_and_profile_follows_its_exact_law(process, profile, mode):
    assert_samples_follow(process, Psi(mode, mode, mode, 0.3, 0.4, profile), steps=7, rows=20_000)


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()])
def test_the_plateau_of_an_inverse_profile_lies_at_its_signal_level(schedule):
    times = Psi(profile="linear-constant-linear-0.7-inv").times(MaskedDiffusion(V, schedule=schedule), 10)
    level = schedule.alpha(torch.tensor(times[5], dtype=torch.float64)).item()
    assert level == pytest.approx(0.7, abs=1e-3 if isinstance(schedule, LogLinear) else 1e-9)  # DUO leaves eps out


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.7, 0.3), (0.15, 0.85), (0.2, 0.6)])
@pytest.mark.parametrize("steps", range(1, 9))
def test_the_regions_are_the_grid_however_their_shares_round(shares, steps):
    sampler = Psi(high_frac=shares[0], middle_frac=shares[1], profile="linear-constant-linear-0.5")
    assert [point for region in sampler.regions(steps + 1) for point in region] == [*range(steps + 1)]
    times = sampler.times(PROCESSES["masked"], steps)
    assert len(times) == steps + 1 and times[0] == 1


def test_small_numbers_are_read_as_python_writes_them():
    kappas = Psi(f"constant-{1e-5}", "constant-remdm-2e-05").kappas(PROCESSES["masked"], [1.0, 0.8, 0.6, 0.4, 0.2])
    assert kappas[0] == 1e-5 and kappas[1] == pytest.approx(1, abs=1e-4) and kappas[1] < 1


@pytest.mark.parametrize("mode", ["constant-remdm", "max-capped", "max-rescale"])
@pytest.mark.parametrize("eta", [0.0, 0.02, 1.0])
def test_kappas_lie_between_zero_and_one(mode, eta):
    sampler = Psi(*[f"{mode}-{eta}"] * 3)
    kappas = sampler.kappas(PROCESSES["masked"], sampler.times(PROCESSES["masked"], 50))
    assert len(kappas) == 51 and min(kappas) >= 0 and max(kappas) == 1
    assert eta == 0 or min(kappas) < 1


def test_nothing_is_remasked_when_the_last_noise_goes():
    for rule in ("constant", "cap", "rescale", "rescale-duo"):
        assert remasking_kappa(PROCESSES["masked"], rule, 0.5, 0.1, 0.0) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"high": "posterior"}, "high must be 'pure-posterior'"),
        ({"middle": "constant-2"}, "middle must be 'pure-posterior'"),
        ({"low": "max-capped-"}, "low must be 'pure-posterior'"),
        ({"low": "max-capped-nan"}, "low must be 'pure-posterior'"),
        ({"profile": "cosine"}, "profile must be 'linear'"),
        ({"profile": "linear-constant-linear-1.5"}, "profile must be 'linear'"),
        ({"profile": "linear-constant-linear-inv"}, "profile must be 'linear'"),
        ({"high_frac": 0.7, "middle_frac": 0.6}, "together at most 1"),
        ({"high_frac": -0.1}, "together at most 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(TokenDriftError, match=message):
        Psi(**options)
