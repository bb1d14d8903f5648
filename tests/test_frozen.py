"""The frozen encoder of a loss: once in memory, in copies and pickles, never in checkpoints, never in training."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tokendrift import ConcatenatedFeatures, MirrorTeacherLoss, PooledFeatures, TokenDriftLoss
from tokendrift.encoders import map_vocabulary
from tokendrift.features import IdentityFeatures
from tokendrift.models import DiT, DiTConfig

V, L = 4000, 8  # a vocabulary that outweighs the rest of the encoder
transformers = pytest.importorskip("transformers", reason="one of the encoders comes from transformers")


def dit():
    torch.manual_seed(0)
    return DiT(DiTConfig(V, L, hidden_dim=16, cond_dim=4, n_blocks=1, n_heads=2)).requires_grad_()


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": L, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, **sizes))


def from_encoder(make):
    return TokenDriftLoss.from_encoder(make(), queue_size=4)


def from_parts(make):
    features = PooledFeatures(make())
    return MirrorTeacherLoss(features.embedding, ConcatenatedFeatures([features, IdentityFeatures()]), queue_size=4)


def mapped(make):
    features = PooledFeatures(make())
    return TokenDriftLoss(map_vocabulary(features.embedding, range(V)), features, queue_size=4)


def through_pickle(loss):
    return pickle.loads(pickle.dumps(loss))


def through_torch_save(loss):
    stored = io.BytesIO()
    torch.save(loss, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


def moved(loss):
    return loss.to(torch.float64).to(torch.float32)


COPIES = [copy.deepcopy, through_pickle, through_torch_save, moved]


def step(loss, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, L, V, generator=generator).requires_grad_()
    value = loss(logits, torch.randint(V, (2, L), generator=generator))
    return value.detach(), *torch.autograd.grad(value, logits)


def held(loss):
    """Bytes of embedding and feature map, shared memory counted once."""
    tensors = [loss.embedding, *loss.feature_map.parameters(), *loss.feature_map.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def encoder_bytes(loss):
    return sum(t.nbytes for t in [*loss.feature_map.parameters(), *loss.feature_map.buffers()])


@pytest.mark.parametrize("copied", COPIES, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", [dit, gpt2])
@pytest.mark.parametrize("build", [from_encoder, from_parts])
def test_the_embedding_exists_once_and_copies_are_as_good_as_the_original(build, make, copied):
    loss = build(make)
    step(loss)
    expected, size = step(copy.deepcopy(loss), 1), encoder_bytes(loss)
    assert held(loss) == size
    other = copied(loss)
    assert held(other) == size
    assert all(torch.equal(one, another) for one, another in zip(step(other, 1), expected, strict=True))


@pytest.mark.parametrize("build", [from_encoder, from_parts])
@pytest.mark.parametrize("make", [dit, gpt2])
def test_a_pickle_holds_the_embedding_once(build, make):
    loss = build(make)
    for size in (len(pickle.dumps(loss)), len(pickle.dumps(loss.feature_map))):
        assert size < encoder_bytes(loss) + 0.5 * loss.embedding.nbytes


@pytest.mark.parametrize("make", [dit, gpt2])
def test_a_mapped_embedding_moves_and_is_copied_with_its_loss(make):
    loss = mapped(make)
    expected = step(copy.deepcopy(loss))
    for copied in COPIES:
        assert all(torch.equal(one, other) for one, other in zip(step(copied(loss)), expected, strict=True))
        assert copied(loss).to(torch.float64).embedding.dtype == torch.float64
        loss.to(torch.float32)


def test_a_copy_does_not_move_with_the_original():
    loss = from_encoder(dit)
    other = copy.deepcopy(loss)
    before = step(copy.deepcopy(other))
    with torch.no_grad():
        for parameter in loss.feature_map.parameters():
            parameter.add_(1.0)
    assert torch.equal(step(other)[0], before[0])


@pytest.mark.parametrize("make", [dit, gpt2])
def test_an_owner_neither_lists_nor_stores_nor_trains_the_encoder(make):
    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.drift = nn.Linear(2, 2), from_encoder(make)

    owner = Training()
    step(owner.drift)
    before = [parameter.clone() for parameter in owner.drift.feature_map.parameters()]
    owner.train().requires_grad_(True).zero_grad()
    owner.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    assert {name.split(".")[0] for name, _ in owner.named_parameters()} == {"model"}
    stored = owner.state_dict()
    queues = {"drift.queue_real", "drift.queue_generated"}
    assert {".".join(name.split(".")[:2]) for name in stored} == {"model.weight", "model.bias"} | queues
    assert sum(tensor.numel() for tensor in stored.values()) < V
    assert not any(module.training for module in owner.drift.feature_map.modules())
    after = list(owner.drift.feature_map.parameters())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_memory_made_anew_is_shared_again():
    loss = from_encoder(dit).to("meta").to_empty(device="cpu")
    assert loss.embedding.data_ptr() == loss.feature_map.encoder.vocab_embed.embedding.data_ptr()


def test_an_embedding_of_its_own_stays_so():
    features = PooledFeatures(dit())
    loss = TokenDriftLoss(features.embedding.clone(), features)
    with torch.no_grad():
        features.encoder.vocab_embed.embedding.zero_()
    assert loss.embedding.abs().sum() > 0
