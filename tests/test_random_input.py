"""The random input of masked models: where it enters, of what size, and that models without it stay as they are."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.diffusion import MaskedDiffusion, Mixture
from tokendrift.doctor.probes import marginal, window_nelbo
from tokendrift.evaluation.nelbo import sequence_nelbo
from tokendrift.models import DiT, DiTConfig, load_denoiser, save_denoiser
from tokendrift.models.layers import Embedding
from tokendrift.models.random_input import (
    RandomMaskEmbedding,
    add_random_input,
    random_numbers,
    without_random_input,
)
from tokendrift.probes import information_decay, unigram_law
from tokendrift.sampling import Analytic, Ancestral, FirstHitting, ReMDM, sample
from tokendrift.sampling.noise import RowNoise
from tokendrift.training.optimization import Autocast

V, D, MASK, K = 7, 64, 6, 4
IDS = torch.tensor([[0, MASK, 3], [MASK, MASK, 2]])


def embedding(seed=0):
    torch.manual_seed(seed)
    return RandomMaskEmbedding(V, D, MASK, K)


def normals(seed=0, shape=(2, 3, K)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_masked_positions_have_the_numbers_through_the_learned_map_and_others_their_token():
    embed, numbers = embedding(), normals()
    found = embed(IDS, normals=numbers)
    masked = IDS == MASK
    assert torch.equal(found[~masked], embed.embedding[IDS[~masked]])
    expected = embed.embedding[MASK] + numbers[masked] @ embed.random_map
    torch.testing.assert_close(found[masked], expected)


def test_the_map_starts_at_the_size_of_the_mask():
    embed = embedding()
    added = embed(torch.full((1, 4000), MASK), normals=normals(shape=(1, 4000, K))) - embed.embedding[MASK]
    size = embed.embedding[MASK].square().sum()
    torch.testing.assert_close(added.square().sum(-1).mean(), size, rtol=0.3, atol=0)  # W itself is drawn


def test_numbers_are_fresh_unless_they_are_given():
    embed = embedding()
    assert not torch.equal(embed(IDS), embed(IDS))
    torch.manual_seed(3)
    first = embed(IDS)
    torch.manual_seed(3)
    assert torch.equal(first, embed(IDS))
    assert torch.equal(embed(IDS, normals=normals()), embed(IDS, normals=normals()))


def test_the_map_learns_from_masked_positions_alone():
    embed, numbers = embedding(), normals()
    embed(IDS, normals=numbers).sum().backward()
    expected = numbers[IDS == MASK].sum(0)[:, None].expand(K, D)
    torch.testing.assert_close(embed.random_map.grad, expected)


def test_inputs_that_are_no_ids_are_embedded_as_before():
    embed = embedding()
    plain = Embedding(V, D)
    plain.embedding = embed.embedding
    soft = torch.randn(2, 3, V)
    assert torch.equal(embed(IDS, lambda matrix: soft @ matrix), plain(IDS, lambda matrix: soft @ matrix))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_embedding(dtype):
    embed = embedding().to(dtype)
    assert embed(IDS).dtype == embed(IDS, normals=normals()).dtype == dtype


def backbone():
    torch.manual_seed(0)
    return DiT(DiTConfig(V, 3, hidden_dim=16, cond_dim=4, n_blocks=1, n_heads=2, mask_id=MASK))


def test_a_model_is_given_a_random_input_in_place():
    model = backbone()
    matrix, before = model.vocab_embed.embedding, set(model.state_dict())
    assert random_numbers(model) == 0
    add_random_input(model, K, generator=torch.Generator().manual_seed(0))
    assert random_numbers(model) == K and random_numbers(torch.nn.Sequential(model)) == K
    assert model.vocab_embed.embedding is matrix
    assert set(model.state_dict()) == before | {"vocab_embed.random_map"}
    assert model.config == dataclasses.replace(backbone().config, random_input=K)
    assert model(IDS).shape == (2, 3, V) and not torch.equal(model.vocab_embed(IDS), model.vocab_embed(IDS))
    other = backbone()
    add_random_input(other, K, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.vocab_embed.random_map, model.vocab_embed.random_map)
    other.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    assert random_numbers(copied) == K
    assert random_numbers(lambda ids, sigma: ids) == 0


def test_what_does_not_fit_is_refused():
    model = backbone()
    add_random_input(model, K)
    with pytest.raises(TokenDriftError, match="random input of 4 numbers already"):
        add_random_input(model, K)
    with pytest.raises(TokenDriftError, match="numbers"):
        RandomMaskEmbedding(V, D, MASK, 0)
    with pytest.raises(TokenDriftError, match="mask_id"):
        RandomMaskEmbedding(V, D, V, K)
    with pytest.raises(TokenDriftError, match="random_input gives numbers to masked positions"):
        DiTConfig(V, random_input=K)
    with pytest.raises(TokenDriftError, match="the model has no random input"):
        backbone()(IDS, normals=normals())
    with pytest.raises(TokenDriftError, match=r"normals must have shape \(B, L, K\)"):
        embedding()(IDS, normals=normals(shape=(2, 3, K + 1)))


def mixture(numbers=K):
    """A masked model whose predictions differ, with a random input if there are numbers."""
    torch.manual_seed(1)
    model = DiT(DiTConfig(V, 6, hidden_dim=16, cond_dim=4, n_blocks=1, n_heads=2, mask_id=MASK, random_input=numbers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


@pytest.mark.parametrize("sampler", [Ancestral(), FirstHitting(), ReMDM("conf"), Analytic(raw_scores=True)])
def test_samples_are_the_same_in_any_split_into_batches(sampler):
    model, process = mixture().double(), MaskedDiffusion(V, MASK)
    steps = None if isinstance(sampler, FirstHitting) else 3
    options = {"steps": steps, "sampler": sampler, "seed": 5}
    whole = sample(model, process, (12, 6), **options).ids
    torch.manual_seed(99)  # nothing is drawn from the global generator
    assert torch.equal(sample(model, process, (12, 6), batch_size=5, **options).ids, whole)
    rest = sample(Autocast(model, "cpu", torch.bfloat16).network, process, (4, 6), first_row=8, **options).ids
    assert torch.equal(rest, whole[8:])


def test_every_step_of_a_row_has_numbers_of_its_own():
    model, seen = mixture(), []
    model.vocab_embed.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    sample(model, MaskedDiffusion(V, MASK), (3, 6), steps=3, sampler=Analytic(raw_scores=True), seed=0)
    assert len(seen) >= 2 and seen[0].shape == (3, 6, K)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0][0], seen[0][1])
    noise = RowNoise(0, 0, 3, torch.device("cpu"))
    noise.uniform(7)
    assert torch.equal(noise.normal(1, 6, K), seen[1])


def test_numbers_differ_from_one_step_to_the_next_though_no_token_changes():
    model, process, seen = mixture(), MaskedDiffusion(V, MASK), []

    def waiting(chain, steps):
        for _ in range(steps):
            chain.at(0.5)
            seen.append(chain.log_norm)
            yield Mixture(torch.ones(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64))

    assert sample(model, process, (2, 6), steps=3, sampler=waiting, seed=0).nfe == 3
    assert not torch.equal(seen[0], seen[1])
    assert sample(mixture(0), process, (2, 6), steps=3, sampler=waiting, seed=0).nfe == 1


def test_a_model_is_saved_and_loaded_with_its_random_input(tmp_path):
    model = mixture()
    save_denoiser(model, tmp_path / "mixture")
    loaded, process = load_denoiser(tmp_path / "mixture")
    assert loaded.config == model.config and random_numbers(loaded) == K
    ids, numbers = IDS.repeat(1, 2), normals(shape=(2, 6, K))
    assert torch.equal(loaded(ids, normals=numbers), model(ids, normals=numbers))
    assert sequence_nelbo(loaded, process, torch.zeros(5, 6, dtype=torch.int64)).isfinite().all()
    save_denoiser(mixture(0), tmp_path / "plain")
    assert "random_input" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_the_nelbo_of_a_mixture_is_fixed_by_the_seed_however_few_logits_are_held(monkeypatch):
    model, process, ids = mixture().double(), MaskedDiffusion(V, MASK), torch.zeros(5, 6, dtype=torch.int64)
    whole = sequence_nelbo(model, process, ids, seed=3)
    monkeypatch.setattr("tokendrift.evaluation.nelbo.LOGITS", 2 * 6 * V)
    torch.testing.assert_close(sequence_nelbo(model, process, ids, seed=3), whole, rtol=0, atol=1e-12)


def test_without_its_random_input_a_model_predicts_what_it_did_before():
    model = mixture(0)
    before = model(IDS.repeat(1, 2))
    add_random_input(model, K)
    with without_random_input(torch.nn.Sequential(model)):
        with without_random_input(model):
            pass
        assert torch.equal(model(IDS.repeat(1, 2)), before)
    assert not torch.equal(model(IDS.repeat(1, 2)), before)


def test_the_measures_of_the_doctor_and_of_the_probes_are_fixed_by_their_seed():
    model, process, ids = mixture(0), MaskedDiffusion(V, MASK), torch.arange(24).view(4, 6) % MASK
    add_random_input(model, K)
    first, same, other = (window_nelbo(model, process, ids, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(*(marginal(model, process, 6) for _ in range(2)))
    law, options = unigram_law(ids, process), {"positions": 2, "resamples": 10}
    one, split = (information_decay(model, process, ids[:, :4], law, batch_size=n, **options) for n in (4, 3))
    torch.testing.assert_close(torch.tensor(one.entropy), torch.tensor(split.entropy), atol=1e-6, rtol=0)
