"""Laws of frozen feature maps."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tokendrift import (
    ConcatenatedFeatures,
    FeatureQueue,
    PairDriftLoss,
    PooledFeatures,
    TokenDriftError,
    TokenDriftLoss,
    soft_token_lift,
)
from tokendrift.features import IdentityFeatures, masked_mean, unit_vectors
from tokendrift.models import DiT, DiTConfig


class Identity(nn.Module):
    """An encoder whose every layer adds one."""

    def __init__(self, layers=3):
        super().__init__()
        self.layers, self.scale = layers, nn.Parameter(torch.ones(()))

    def hidden_states(self, embeds, *, attention_mask=None):
        return [embeds * self.scale + depth for depth in range(self.layers)]


def golden_dit(numbers, **config):
    model = DiT(DiTConfig(23, 12, 32, 8, 2, 4, **config))
    prefix = "state_dict."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in numbers.data.items() if k.startswith(prefix)})
    return model


@pytest.mark.parametrize(("fixture", "case"), [("dit_mdlm", "no_time"), ("dit_duo", "ids_no_time")])
def test_pooled_features_have_the_golden_values(golden, fixture, case):
    numbers = golden(fixture)
    model = golden_dit(numbers, time_conditioning=False)
    features = PooledFeatures(model)
    embeds = nn.functional.embedding(numbers["input_ids"], features.encoder.vocab_embed.embedding)
    numbers.assert_matches(features(embeds), f"{case}.features")


@pytest.mark.parametrize(
    ("fixture", "case"), [("dit_mdlm", "time"), ("dit_mdlm", "short_time"), ("dit_duo", "ids"), ("dit_duo", "soft")]
)
def test_features_with_a_noise_level_pool_the_golden_hidden_states(golden, fixture, case):
    """Features of the loss run at clean time; the golden ones have a sigma, given here by the encoder."""
    numbers = golden(fixture)

    class AtSigma(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def hidden_states(self, embeds, *, attention_mask=None):
            return self.model.hidden_states(embeds, numbers["sigma"], attention_mask=attention_mask)

    model = golden_dit(numbers, time_conditioning=True)
    if case == "soft":
        embeds = soft_token_lift(numbers["soft_input"], model.vocab_embed.embedding.detach())
    else:
        length = numbers[f"{case}.hidden.0"].shape[1]
        embeds = model.vocab_embed.embedding.detach()[numbers["input_ids"][:, :length]]
    numbers.assert_matches(PooledFeatures(AtSigma(model))(embeds), f"{case}.features")


def test_the_gradient_of_features_to_soft_input_has_the_golden_values(golden):
    numbers = golden("dit_duo")
    model = golden_dit(numbers, time_conditioning=True).double().eval()
    logits = numbers["soft_input"].double().requires_grad_()
    embeds = soft_token_lift(logits, model.vocab_embed.embedding.detach())
    hidden = model.hidden_states(embeds, numbers["sigma"].double())
    features = nn.functional.normalize(torch.cat([hidden[-2].mean(1), hidden[-1].mean(1)], -1), dim=-1)
    (features * numbers["soft.features_upstream_grad"]).sum().backward()
    numbers.assert_matches(logits.grad, "soft.grad_soft_input_float64", tolerance=numbers.tolerance["float64"])


def test_features_are_the_unit_length_means_of_the_chosen_layers(backbone):
    model = backbone(time_conditioning=True)
    embeds = torch.randn(3, 8, 16)
    hidden = model.hidden_states(embeds)
    features = PooledFeatures(model, layers=(0, -1))(embeds)
    expected = torch.cat([hidden[0].mean(1), hidden[2].mean(1)], dim=-1)
    torch.testing.assert_close(features, expected / expected.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    plain = PooledFeatures(model, layers=(0, -1), normalize=False)(embeds)
    torch.testing.assert_close(plain, expected)


@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4), seed=st.integers(0, 2**31 - 1))
def test_padding_does_not_touch_the_features(backbone, lengths, seed):
    """A padded row has the features of the same row alone, cut to its length."""
    generator = torch.Generator().manual_seed(seed)
    features = PooledFeatures(backbone())
    embeds = torch.randn(len(lengths), 8, 16, generator=generator)
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    padded = features(embeds, attention_mask=mask)
    alone = torch.cat([features(embeds[i : i + 1, :length]) for i, length in enumerate(lengths)])
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_the_masked_mean_is_wide_and_never_divides_by_zero():
    hidden = torch.full((2, 1000, 1), 1.01, dtype=torch.bfloat16)
    mean = masked_mean(hidden, torch.tensor([[True] * 1000, [False] * 1000]))
    assert mean.dtype == torch.float32
    assert mean[0].item() == pytest.approx(hidden[0, 0].item(), rel=1e-6)
    assert mean[1].item() == 0


def test_the_frozen_copy_is_not_moved_by_training_the_original(backbone):
    model = backbone().train()
    features, embeds = PooledFeatures(model), torch.randn(2, 8, 16)
    before = features(embeds)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.zeros(2, 8, dtype=torch.int64)).square().mean().backward()
    optimizer.step()
    assert torch.equal(features(embeds), before)
    assert not torch.equal(PooledFeatures(model)(embeds), before)
    assert model.training  # and copying did not change the original
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_encoder_stays_frozen_and_in_evaluation_mode(backbone):
    features = PooledFeatures(backbone().train())
    for module in (features, nn.Sequential(features)):
        module.train()
        assert not any(part.training for part in features.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert features.train() is features
    embeds = torch.randn(2, 8, 16)
    assert torch.equal(features(embeds), features(embeds))  # dropout would differ


def test_features_are_differentiable_in_their_embeddings(backbone):
    embeds = torch.randn(2, 8, 16, requires_grad=True)
    PooledFeatures(backbone())(embeds)[:, 0].sum().backward()
    assert (embeds.grad.abs().sum(-1) > 0).all()


def test_half_precision_encoders_give_float32_features(backbone):
    features = PooledFeatures(backbone().bfloat16())
    out = features(torch.randn(2, 8, 16))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2))  # normalised after the cast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PooledFeatures(backbone())(torch.randn(2, 8, 16)).dtype == torch.float32


def test_pooled_features_can_be_copied():
    features, embeds = PooledFeatures(Identity()), torch.randn(2, 4, 3)
    assert torch.equal(copy.deepcopy(features)(embeds), features(embeds))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": nn.Linear(2, 2)}, "encoder must have a method hidden_states"),
        ({"encoder": Identity(), "layers": ()}, "layers must name at least one hidden layer"),
        ({"encoder": Identity(), "layers": -1}, "layers must name at least one hidden layer"),
        ({"encoder": Identity(), "layers": ("last",)}, "layers must name at least one hidden layer"),
    ],
)
def test_bad_encoders_are_refused(arguments, message):
    with pytest.raises(TokenDriftError, match=message):
        PooledFeatures(**arguments)


@pytest.mark.parametrize("layers", [(-4,), (3,), (0, 3)])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(TokenDriftError, match="do not exist: the encoder returns 3 hidden states"):
        PooledFeatures(Identity(3), layers=layers)(torch.zeros(1, 2, 3))


def test_embeddings_without_a_batch_axis_are_refused():
    with pytest.raises(TokenDriftError, match=r"embeds must have shape \(B, L, D\), but it has 2 axes"):
        PooledFeatures(Identity())(torch.zeros(2, 3))


def test_windows_pool_their_own_positions(backbone):
    encoder = backbone()
    embeds = torch.randn(2, 8, 16)
    features = PooledFeatures(encoder, window=4, layers=(-1,), normalize=False)(embeds)
    hidden = encoder.hidden_states(embeds)[-1]
    torch.testing.assert_close(features, torch.stack([hidden[:, :4].mean(1), hidden[:, 4:].mean(1)], dim=1))
    assert PooledFeatures(encoder, window=4)(embeds).shape == (2, 2, 32)


def test_a_window_of_the_whole_sequence_is_the_pooled_feature(backbone):
    embeds = torch.randn(2, 8, 16)
    whole, windowed = PooledFeatures(backbone()), PooledFeatures(backbone(), window=8)
    torch.testing.assert_close(windowed(embeds)[:, 0], whole(embeds))


def test_sigma_is_what_the_encoder_is_told(backbone):
    encoder, embeds = backbone(time_conditioning=True), torch.randn(2, 8, 16)
    hidden = encoder.hidden_states(embeds, torch.full((2,), 0.7))[-1]
    told = PooledFeatures(encoder, sigma=0.7, layers=(-1,), normalize=False)(embeds)
    torch.testing.assert_close(told, hidden.mean(dim=1))
    assert not torch.allclose(told, PooledFeatures(encoder, layers=(-1,), normalize=False)(embeds))


def test_sigma_for_a_backbone_that_does_not_use_it_is_refused(backbone):
    with pytest.raises(TokenDriftError, match="not conditioned on a noise level"):
        PooledFeatures(backbone(time_conditioning=False), sigma=0.7)


def test_the_last_window_may_be_shorter(backbone):
    encoder, embeds = backbone(), torch.randn(2, 8, 16)
    hidden = encoder.hidden_states(embeds)[-1]
    features = PooledFeatures(encoder, window=3, layers=(-1,), normalize=False)(embeds)
    torch.testing.assert_close(features, torch.stack([part.mean(1) for part in hidden.split(3, dim=1)], dim=1))


def test_several_widths_follow_one_another(backbone):
    encoder, embeds = backbone(), torch.randn(2, 8, 16)
    several = PooledFeatures(encoder, window=(2, 8, None))(embeds)
    assert several.shape == (2, 6, 32)
    assert torch.equal(several[:, :4], PooledFeatures(encoder, window=2)(embeds))
    assert torch.equal(several[:, 4:5], PooledFeatures(encoder, window=8)(embeds))
    torch.testing.assert_close(several[:, 5], PooledFeatures(encoder)(embeds))


@given(lengths=st.lists(st.integers(0, 8), min_size=1, max_size=4), width=st.integers(1, 9), left=st.booleans())
def test_windows_of_padded_rows_are_those_of_the_row_alone(backbone, lengths, width, left):
    """Right of the text a row's windows end early; left of it they start late: only positions that count are pooled."""
    features = PooledFeatures(backbone(), window=(width, None))
    embeds = torch.randn(len(lengths), 8, 16, generator=torch.Generator().manual_seed(width))
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    padded, present = features(embeds, mask), features.present(mask)
    assert present.shape == padded.shape[:2]
    for row, each, here in zip(embeds, mask, present, strict=True):
        expected = each.nonzero().flatten() // width
        assert here[:-1].nonzero().flatten().tolist() == sorted(set(expected.tolist()))
        assert here[-1] == each.any()
        if not left and each.any():
            alone = features(row[None, each])[0]
            torch.testing.assert_close(padded[embeds.eq(row).all(-1).all(-1)][0][here], alone, rtol=1e-4, atol=1e-5)
    assert not padded[~present].any()


def test_a_map_without_windows_leaves_out_sequences_of_padding(backbone):
    mask = torch.arange(8) < torch.tensor([[8], [0], [1]])
    assert torch.equal(PooledFeatures(backbone()).present(mask), torch.tensor([[True], [False], [True]]))


def test_padding_need_not_be_finite():
    """Where a map pools the embeddings themselves, what stands at padding is never read."""
    embeds = torch.randn(2, 8, 3)
    mask = torch.arange(8) < torch.tensor([[5], [8]])
    broken = embeds.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    for features in (IdentityFeatures(), IdentityFeatures(window=3)):
        found = features(broken, mask)
        assert torch.equal(found, features(embeds, mask))
        (grad,) = torch.autograd.grad(found.sum(), broken)
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"window": (2, 0)}, "window must be an integer of at least 1"),
        ({"window": ()}, "window must name at least one width"),
        ({"sigma": -0.5}, "sigma must be a finite number of at least 0"),
        ({"sigma": 0.5}, "sigma was given, but the encoder is not conditioned on a noise level"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    with pytest.raises(TokenDriftError, match=message):
        PooledFeatures(Identity(), **arguments)


# ------------------------------------------------------------------------------------- identity and concatenation


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_identity_features_are_the_unit_mean_of_the_embeddings(dtype):
    embeds = torch.randn(2, 6, 3).to(dtype)
    wide = embeds.to(torch.promote_types(dtype, torch.float32))
    torch.testing.assert_close(IdentityFeatures(normalize=False)(embeds), wide.mean(1))
    torch.testing.assert_close(IdentityFeatures()(embeds), nn.functional.normalize(wide.mean(1), dim=-1))
    windows = IdentityFeatures(window=3, normalize=False)(embeds)
    torch.testing.assert_close(windows, wide.unflatten(1, (2, 3)).mean(2))
    assert not list(IdentityFeatures().parameters())


@given(weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3), seed=st.integers(0, 2**31 - 1))
def test_squared_distances_of_concatenated_maps_add_up(backbone, weights, seed):
    maps = [IdentityFeatures(), PooledFeatures(backbone()), PooledFeatures(backbone(seed=1), layers=(0,))]
    both = ConcatenatedFeatures(maps, weights=weights)
    embeds = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(seed))
    h = both(embeds)
    torch.testing.assert_close(h.norm(dim=-1), torch.ones(2))
    parts = [(each(embeds)[0] - each(embeds)[1]).square().sum() for each in maps]
    expected = sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
    torch.testing.assert_close((h[0] - h[1]).square().sum(), expected, rtol=1e-4, atol=1e-6)


def test_concatenated_maps_weigh_the_same_unless_told():
    maps = [IdentityFeatures(), lambda embeds: embeds.amax(dim=1)]
    embeds = torch.randn(2, 4, 3)
    expected = torch.cat([each(embeds) for each in maps], dim=-1) / 2**0.5
    torch.testing.assert_close(ConcatenatedFeatures(maps)(embeds), expected)


def test_each_map_can_have_an_embedding_of_its_own(backbone):
    """One lift of the matrices side by side gives every encoder the soft embeddings of its own space."""
    encoders = [PooledFeatures(backbone()), PooledFeatures(backbone(seed=1), layers=(0, 1, 2))]
    tables = [each.embedding for each in encoders]
    both = ConcatenatedFeatures(encoders, widths=[16, 16])
    logits = torch.randn(2, 8, 13, requires_grad=True)
    expected = torch.cat([each(soft_token_lift(logits, e)) for each, e in zip(encoders, tables, strict=True)], dim=-1)
    torch.testing.assert_close(both(soft_token_lift(logits, torch.cat(tables, dim=1))), expected / 2**0.5)
    loss = TokenDriftLoss(torch.cat(tables, dim=1), both)
    (grad,) = torch.autograd.grad(loss(logits, torch.randint(13, (2, 8))), logits)
    assert grad.abs().sum() > 0


def test_concatenated_windows_stay_windows(backbone):
    maps = [PooledFeatures(backbone(), window=(2, 4)), IdentityFeatures(window=(2, 4))]
    both = ConcatenatedFeatures(
        [lambda e, attention_mask=None: IdentityFeatures(window=(2, 4))(e, attention_mask), *maps]
    )
    embeds, mask = torch.randn(2, 8, 16), torch.arange(8) < torch.tensor([[8], [3]])
    found = both(embeds, mask)
    assert found.shape == (2, 6, 16 + 32 + 16)
    torch.testing.assert_close(found[..., 16:48] * 3**0.5, maps[0](embeds, mask))
    assert torch.equal(both.present(mask), maps[0].present(mask))
    assert ConcatenatedFeatures([lambda embeds: embeds]).present(mask) is None


def test_concatenated_maps_stay_frozen_and_move_together(backbone):
    both = ConcatenatedFeatures([PooledFeatures(backbone()), IdentityFeatures()])
    nn.Sequential(both).train()
    assert not any(module.training for module in both.modules())
    assert both.train() is both
    embeds = torch.randn(2, 8, 16)
    before = both(embeds)
    other = copy.deepcopy(both).double()
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float64}
    torch.testing.assert_close(other(embeds.double()).float(), before)
    assert torch.equal(both(embeds), before)


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        ([], {}, "maps must hold at least one feature map"),
        ([IdentityFeatures()], {"weights": [1, 2]}, "weights must have one entry for each of the 1 maps"),
        ([IdentityFeatures()], {"widths": []}, "widths must have one entry for each of the 1 maps"),
        ([IdentityFeatures()], {"weights": [0]}, "weights must be a finite number above 0"),
        ([IdentityFeatures()], {"widths": [0]}, "widths must be an integer of at least 1"),
        ([nn.Linear(2, 2)], {}, r"maps\[0\] must be frozen, but it has 2 parameters that require grad"),
        ([nn.Dropout()], {}, r"maps\[0\] must be frozen, but it has training mode"),
    ],
)
def test_bad_concatenations_are_refused(maps, options, message):
    with pytest.raises(TokenDriftError, match=message):
        ConcatenatedFeatures(maps, **options)


def test_maps_that_do_not_go_together_are_named():
    embeds = torch.zeros(2, 8, 3)
    with pytest.raises(TokenDriftError, match=r"different numbers of windows: \(2, 3\), \(2, 4, 3\)"):
        ConcatenatedFeatures([IdentityFeatures(), IdentityFeatures(window=2)])(embeds)
    with pytest.raises(TokenDriftError, match=r"widths \[2, 2\] must add up to D = 3"):
        ConcatenatedFeatures([IdentityFeatures(), IdentityFeatures()], widths=[2, 2])(embeds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_built_where_the_default_dtype_is_narrow_computes_in_float32(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        queue, pairs = FeatureQueue(2, width=3), PairDriftLoss(4)
        units = unit_vectors(torch.tensor([[0.0, 0.0], [3e25, 4e25]], dtype=torch.float32))
    finally:
        torch.set_default_dtype(before)
    assert queue.buffer.dtype == pairs.real.dtype == pairs.generated.dtype == torch.float32
    torch.testing.assert_close(units, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
