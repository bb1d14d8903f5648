"""Windows in the loss: every window of text is a point of the clouds, a window of padding is none."""

from __future__ import annotations

import pytest
import torch

from tokendrift import ConcatenatedFeatures, MirrorTeacherLoss, TokenDriftError, TokenDriftLoss
from tokendrift.features import IdentityFeatures

B, L, V, D, W = 3, 8, 6, 5, 2
LENGTHS = [8, 4, 2]  # text of each row, in whole windows
TABLE = torch.randn(V, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LOSSES = [TokenDriftLoss, MirrorTeacherLoss]


def padded_inputs(lengths, side="right"):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(lengths), L, V, dtype=torch.float64, generator=generator)
    clean = torch.randint(V, (len(lengths), L), generator=generator)
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    return logits, clean, mask.flip(1) if side == "left" else mask


def graded(loss, logits, *args, **kwargs):
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, *args, **kwargs)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("cls", "options"), [(TokenDriftLoss, {}), (MirrorTeacherLoss, {"distance": "mse"})])
def test_windows_of_padded_rows_are_sequences_of_their_own(cls, options, side):
    """A sequence's loss is the mean over its windows of text, each of them an anchor like any other.

    The mirror teacher steps along the drift of that mean: 1 / W of a window's own step, whose square is its loss.
    """
    logits, clean, mask = padded_inputs(LENGTHS, side)
    options = options | {"reduction": "none", "queue_size": 16}
    loss = cls(TABLE, IdentityFeatures(window=W), **options)
    value, grad = graded(loss, logits, clean, attention_mask=mask)

    text = mask.unflatten(1, (-1, W))[..., 0]
    pieces, ids = logits.unflatten(1, (-1, W))[text], clean.unflatten(1, (-1, W))[text]
    apart = cls(TABLE, IdentityFeatures(), **options)
    each, each_grad = graded(apart, pieces, ids)
    windows = text.sum(dim=1)
    shares = 1 / windows.double().repeat_interleave(windows)
    power = 1 if cls is TokenDriftLoss else 2
    expected = torch.stack([part.sum() for part in (each * shares**power).split(windows.tolist())])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    expected_grad = torch.zeros_like(logits.unflatten(1, (-1, W)))
    expected_grad[text] = each_grad * shares[:, None, None]
    torch.testing.assert_close(grad, expected_grad.flatten(1, 2), rtol=0, atol=1e-14)
    for name in ("queue_real", "queue_generated"):
        assert len(getattr(loss, name)) == sum(LENGTHS) // W
        torch.testing.assert_close(getattr(loss, name).features(), getattr(apart, name).features())
    assert not grad[~mask].any()


@pytest.mark.parametrize("cls", LOSSES)
@pytest.mark.parametrize("window", [2, 3, (2, None)])
def test_padding_that_all_rows_share_can_be_cut_off(cls, window):
    logits, clean, mask = padded_inputs([6, 6, 6])
    features = IdentityFeatures(window=window)
    padded, padded_grad = graded(cls(TABLE, features), logits, clean, attention_mask=mask)
    cut, cut_grad = graded(cls(TABLE, features), logits[:, :6], clean[:, :6])
    torch.testing.assert_close(padded, cut, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded_grad[:, :6], cut_grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cls", LOSSES)
def test_a_mask_that_hides_nothing_changes_nothing(cls):
    logits, clean, mask = padded_inputs([L] * B)
    features = IdentityFeatures(window=W)
    plain = graded(cls(TABLE, features), logits, clean)
    torch.testing.assert_close(graded(cls(TABLE, features), logits, clean, attention_mask=mask), plain)


@pytest.mark.parametrize("window", [W, None])
@pytest.mark.parametrize("cls", LOSSES)
def test_rows_of_padding_alone_do_not_count(cls, window):
    """The mean is over sequences that have text, the value of a row without text is zero."""
    logits, clean, mask = padded_inputs([8, 0, 2, 0])
    features = IdentityFeatures(window=window)
    value, grad = graded(cls(TABLE, features), logits, clean, attention_mask=mask)
    kept = [0, 2]
    expected, expected_grad = graded(cls(TABLE, features), logits[kept], clean[kept], attention_mask=mask[kept])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad[kept], expected_grad, rtol=0, atol=1e-14)
    none, _ = graded(cls(TABLE, features, reduction="none"), logits, clean, attention_mask=mask)
    assert not none[[1, 3]].any()
    assert none[kept].all()


def test_a_map_whose_present_windows_do_not_fit_is_named():
    class Odd(IdentityFeatures):
        def present(self, attention_mask):
            return attention_mask

    logits, clean, mask = padded_inputs(LENGTHS)
    with pytest.raises(TokenDriftError, match=r"present\(attention_mask\) must be bool \(B, W\)"):
        TokenDriftLoss(TABLE, Odd(window=W))(logits, clean, attention_mask=mask)


def test_maps_that_do_not_say_what_is_present_can_be_put_together_in_a_padded_batch():
    def mean(embeds, attention_mask):
        return embeds.mean(dim=1)

    logits, ids = torch.randn(3, 4, 5), torch.zeros(3, 4, dtype=torch.int64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = False
    alone, together = (
        TokenDriftLoss(torch.eye(5), features)(logits, ids, attention_mask=mask)
        for features in (mean, ConcatenatedFeatures([mean]))
    )
    assert torch.equal(alone, together)
