"""Laws of encoders behind feature maps: transformers models by their input embeddings, and other vocabularies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tokendrift import PooledFeatures, TokenDriftError, TokenDriftLoss
from tokendrift.encoders import InputsEmbedsEncoder, as_encoder, input_embedding, map_vocabulary

transformers = pytest.importorskip("transformers", reason="the models of these tests come from transformers")

V, D, L = 31, 16, 8
ENCODER = {"vocab_size": V, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STACK = ENCODER | {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**STACK))


def roberta():  # counts its positions from the padding id + 1
    return transformers.RobertaModel(transformers.RobertaConfig(**STACK))


def distilbert():
    sizes = {"dim": D, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    return transformers.DistilBertModel(transformers.DistilBertConfig(**ENCODER, **sizes))


def bart():  # scales its embeddings
    sizes = {"d_model": D, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    config = transformers.BartConfig(**ENCODER, **sizes, decoder_layers=1, scale_embedding=True)
    return transformers.BartModel(config).get_encoder()


def gpt2():
    sizes = {"n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 20, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, **sizes))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**STACK))


@pytest.fixture(scope="module", autouse=True)
def _float64():
    """Make float64 the default: older transformers build masks in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


MODELS = [bert, roberta, distilbert, bart, gpt2, llama]


@pytest.fixture(scope="module", params=MODELS, ids=lambda make: make.__name__)
def model(request):
    """A small model in float64 whose attention is far from uniform, so that a wrong mask or position shows."""
    torch.manual_seed(0)
    made = request.param().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4 / parameter.std())
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return made


def own_hidden_states(model, **inputs):
    return model(**inputs, output_hidden_states=True, return_dict=True).hidden_states


def tokens(batch=2, length=L, seed=0):
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------- hidden states and features


def test_hidden_states_of_embedded_ids_are_those_the_model_shows_for_the_ids(model):
    encoder, ids = as_encoder(model), tokens()
    found = encoder.hidden_states(input_embedding(encoder)[ids])
    expected = own_hidden_states(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_features_and_gradient_are_those_through_the_models_own_forward(model):
    """Of soft embeddings, pooled by hand."""
    soft = torch.randn(2, L, V).softmax(dim=-1) @ input_embedding(as_encoder(model))
    soft.requires_grad_()
    upstream = torch.randn(2, 2 * D)
    hidden = own_hidden_states(model, inputs_embeds=soft)
    expected = nn.functional.normalize(torch.cat([hidden[-2].mean(1), hidden[-1].mean(1)], dim=-1), dim=-1)
    (expected_grad,) = torch.autograd.grad(expected, soft, upstream)
    features = PooledFeatures(model)
    actual = features(soft)
    (grad,) = torch.autograd.grad(actual, soft, upstream)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)
    assert (grad.abs().sum(-1) > 1e-6).all()
    assert all(parameter.grad is None for parameter in [*model.parameters(), *features.parameters()])


@pytest.mark.parametrize("side", ["right", "left", "gaps"])
def test_a_padded_row_has_the_features_and_gradient_of_the_row_alone(model, side):
    text = torch.randn(1, 5, D, requires_grad=True)
    places = {"right": [0, 1, 2, 3, 4], "left": [3, 4, 5, 6, 7], "gaps": [0, 2, 3, 6, 7]}[side]
    mask = torch.zeros(1, L, dtype=torch.bool)
    mask[0, places] = True
    padded = torch.full((1, L, D), 7.0).index_copy(1, torch.tensor(places), text)
    features, upstream = PooledFeatures(model), torch.randn(1, 2 * D)
    found = []
    for out in (features(text), features(padded, mask)):
        found.append((out, *torch.autograd.grad(out, text, upstream)))
    for alone, among_padding in zip(*found, strict=True):
        torch.testing.assert_close(among_padding, alone, rtol=0, atol=1e-10)


def test_padding_matters_when_it_is_not_masked(model):
    text = torch.randn(1, L, D)
    features, mask = PooledFeatures(model), torch.arange(L)[None] < 5
    assert (features(text) - features(text, mask)).abs().max() > 1e-3


def test_windows_of_a_padded_row_stand_at_its_own_positions(model):
    text = torch.randn(1, L, D)
    mask = torch.arange(L)[None] >= 4
    windows = PooledFeatures(model, window=2)(text, mask)
    assert not windows[0, :2].any()
    torch.testing.assert_close(windows[:, 2:], PooledFeatures(model, window=2)(text[:, 4:]), rtol=0, atol=1e-10)


def test_a_row_of_padding_alone_is_finite_and_leaves_the_others_as_they_are(model):
    embeds = torch.randn(2, L, D, requires_grad=True)
    mask = torch.tensor([[True] * L, [False] * L])
    features = PooledFeatures(model)
    found = features(embeds, mask)
    torch.testing.assert_close(found[:1], features(embeds[:1]), rtol=0, atol=1e-12)
    assert not found[1].any()
    found.square().sum().backward()
    assert embeds.grad.isfinite().all()


# ------------------------------------------------------------------------------------- what is copied


def test_the_head_is_not_copied():
    for head, body in ((bert(), "BertModel"), (gpt2(), "GPT2Model"), (llama(), "LlamaModel")):
        encoder = PooledFeatures(head).encoder
        assert type(encoder.model).__name__ == body
        kept, whole = (sum(p.numel() for p in module.parameters()) for module in (encoder, head.base_model))
        assert kept == whole


def test_dropout_and_training_of_the_original_do_not_reach_the_copy(model):
    embeds = torch.randn(2, L, D)
    features = PooledFeatures(model.train())
    try:
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(features(embeds), features(embeds))
        assert not any(part.training for part in features.modules())
        assert not any(parameter.requires_grad for parameter in features.parameters())
    finally:
        model.eval()


def test_from_encoder_takes_a_transformers_model(model):
    """The loss equals one whose parts are made by hand from the model's own forward."""

    def by_hand(embeds):
        hidden = own_hidden_states(model, inputs_embeds=embeds)
        return nn.functional.normalize(torch.cat([hidden[-2].mean(1), hidden[-1].mean(1)], dim=-1), dim=-1)

    table = input_embedding(as_encoder(model))
    gradients = []
    for loss in (TokenDriftLoss.from_encoder(model), TokenDriftLoss(table, by_hand)):
        torch.manual_seed(1)
        logits = torch.randn(3, L, V).requires_grad_()
        value = loss(logits, tokens(3))
        gradients.append((value, *torch.autograd.grad(value, logits)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
    assert gradients[0][1].abs().max() > 1e-6


def test_embeddings_share_the_memory_of_the_model_unless_it_scales_them():
    model, scaled = gpt2(), bart()
    assert input_embedding(model).data_ptr() == model.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(input_embedding(scaled), scaled.get_input_embeddings().weight * D**0.5)
    assert not input_embedding(scaled).requires_grad


# ------------------------------------------------------------------------------------- refusals


class NoHiddenStates(nn.Module):
    def forward(self, inputs_embeds, attention_mask=None, **options):
        return inputs_embeds


class EncoderDecoder(NoHiddenStates):
    def forward(self, inputs_embeds, attention_mask=None, decoder_input_ids=None, **options):
        return inputs_embeds


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (EncoderDecoder(), r"no input for the decoder of an encoder-decoder model[\s\S]*model\.get_encoder\(\)"),
        (
            nn.Linear(2, 2),
            r"encoder must have a method hidden_states[\s\S]*takes inputs_embeds[\s\S]*Add what is missing",
        ),
        (Wrapper(), r"encoder must have a method hidden_states[\s\S]*inside the wrapper: encoder\.module"),
    ],
)
def test_what_is_no_encoder_is_refused(encoder, message):
    with pytest.raises(TokenDriftError, match=message):
        PooledFeatures(encoder)


class Adapted(nn.Module):
    """What peft puts around a model when it is not told the task."""

    peft_config = None

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_model(self):
        return self.base

    def forward(self, *args, **options):
        return self.base(*args, **options)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), Adapted])
def test_a_compiled_or_adapted_model_is_taken_out_of_its_wrapper(wrap):
    model, embeds = bert(), torch.randn(2, 5, 16)
    assert torch.equal(PooledFeatures(wrap(model))(embeds), PooledFeatures(model)(embeds))


def test_an_encoder_that_shows_no_hidden_states_is_named():
    with pytest.raises(TokenDriftError, match=r"returned no hidden_states although[\s\S]*NoHiddenStates"):
        PooledFeatures(NoHiddenStates())(torch.zeros(1, 2, 3))
    with pytest.raises(TokenDriftError, match=r"forward must accept inputs_embeds"):
        InputsEmbedsEncoder(nn.Linear(2, 2))


@pytest.mark.parametrize("make", [bert, gpt2])
def test_sequences_longer_than_the_encoder_knows_are_refused(make):
    with pytest.raises(TokenDriftError, match=r"at most 20 positions .* but L is 21"):
        PooledFeatures(make())(torch.zeros(1, 21, D))


def test_a_noise_level_for_an_encoder_without_one_is_refused():
    with pytest.raises(TokenDriftError, match="not conditioned on a noise level"):
        TokenDriftLoss.from_encoder(bert(), sigma=0.5)


# ------------------------------------------------------------------------------------- other vocabularies


@given(order=st.permutations(range(V)))
def test_with_its_ids_mapped_a_permuted_vocabulary_has_the_same_features(order):
    embedding = torch.randn(V, D)
    ids = torch.tensor(order)  # entry i of the denoiser is the encoder's token ids[i]
    text = tokens()
    assert torch.equal(map_vocabulary(embedding, ids)[ids.argsort()[text]], embedding[text])


def test_entries_without_a_counterpart_are_the_mean_or_zero():
    embedding = torch.randn(3, 2, dtype=torch.bfloat16)
    mapped = map_vocabulary(embedding, [2, -1, 0])
    assert mapped.dtype == torch.bfloat16
    assert torch.equal(mapped[[0, 2]], embedding[[2, 0]])
    assert torch.equal(mapped[1], embedding.float().mean(0).bfloat16())
    assert torch.equal(map_vocabulary(embedding, [2, -1, 0], missing="zero")[1], torch.zeros(2, dtype=torch.bfloat16))


def test_the_mapped_embedding_is_detached():
    assert not map_vocabulary(nn.Parameter(torch.ones(2, 2)), [0, 1]).requires_grad


def test_one_entry_more_for_the_mask_fails_with_both_sizes_and_the_way_out_works():
    """What stands in the row of the mask does not matter: it has no probability and is never seen."""
    encoder = gpt2().eval()
    clean = tokens()
    noisy, predicted = torch.full_like(clean, V), torch.ones(2, L, dtype=torch.bool)
    noisy[:, ::2], predicted[:, ::2] = clean[:, ::2], False
    logits = torch.randn(2, L, V + 1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        TokenDriftError, match=rf"logits has {V + 1} columns \(V\) but embedding has {V} rows"
    ) as caught:
        TokenDriftLoss.from_encoder(encoder)(logits, clean)
    assert "tokendrift.encoders.map_vocabulary(embedding, ids)" in str(caught.value)

    features = PooledFeatures(encoder)
    expected = TokenDriftLoss(features.embedding, features)(
        logits[..., :V], clean, noisy_ids=noisy.clamp_max(V - 1), predicted=predicted
    )
    for missing in ("mean", "zero"):
        mapped = map_vocabulary(features.embedding, [*range(V), -1], missing=missing)
        loss = TokenDriftLoss(mapped, features, mask_id=V)
        torch.testing.assert_close(loss(logits, clean, noisy_ids=noisy), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 3],), r"ids go from 0 to 3, but the encoder's vocabulary V has 3 entries \(0 to 2; -1 for none\)"),
        (([0, -2],), "ids go from -2 to 0"),
        (([-1, -1],), "no entry of the denoiser's vocabulary has a counterpart"),
        (([0.0, 1.0],), "ids must be integers"),
        (([[0, 1]],), r"ids must have shape \(V',\), but it has 2 axes"),
        (([0], "last"), "missing must be one of 'mean', 'zero'"),
    ],
)
def test_bad_maps_of_a_vocabulary_are_refused(arguments, message):
    ids, *missing = arguments
    with pytest.raises(TokenDriftError, match=message):
        map_vocabulary(torch.zeros(3, 2), ids, **({"missing": missing[0]} if missing else {}))
