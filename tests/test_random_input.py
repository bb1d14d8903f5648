"""The random input of masked models: where it enters, of what size, and that models without it stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.models import DiT, DiTConfig
from tokendrift.models.layers import Embedding
from tokendrift.models.random_input import RandomMaskEmbedding, add_random_input, random_numbers

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
    assert torch.equal(embed(soft), plain(soft))
    weights = torch.rand(2, 3, 2)
    ids = IDS[..., None].expand(-1, -1, 2)
    assert torch.equal(embed(ids, weights), plain(ids, weights))


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
    add_random_input(model, K, MASK, generator=torch.Generator().manual_seed(0))
    assert random_numbers(model) == K and random_numbers(torch.nn.Sequential(model)) == K
    assert model.vocab_embed.embedding is matrix
    assert set(model.state_dict()) == before | {"vocab_embed.random_map"}
    assert model(IDS).shape == (2, 3, V) and not torch.equal(model.vocab_embed(IDS), model.vocab_embed(IDS))
    other = backbone()
    add_random_input(other, K, MASK, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.vocab_embed.random_map, model.vocab_embed.random_map)
    other.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    assert random_numbers(copied) == K
    assert random_numbers(lambda ids, sigma: ids) == 0


def test_what_does_not_fit_is_refused():
    model = backbone()
    add_random_input(model, K, MASK)
    with pytest.raises(TokenDriftError, match="plain Embedding"):
        add_random_input(model, K, MASK)
    with pytest.raises(TokenDriftError, match="numbers"):
        RandomMaskEmbedding(V, D, MASK, 0)
    with pytest.raises(TokenDriftError, match="mask_id"):
        RandomMaskEmbedding(V, D, V, K)
    with pytest.raises(TokenDriftError, match=r"normals must have shape \(B, L, K\)"):
        embedding()(IDS, normals=normals(shape=(2, 3, K + 1)))
