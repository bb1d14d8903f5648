"""Denoisers of others: any masked language model, and the modules of the two official repositories."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from tokendrift import TokenDriftError, TokenDriftLoss
from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.diffusion.gaussian import GaussianUniformDiffusion
from tokendrift.models import DiT, DiTConfig, MaskedLMDenoiser, OfficialDenoiser
from tokendrift.sampling import sample
from tokendrift.training import Continuation, Drift


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


class OfficialModule(nn.Module):
    """What the adapters see of the repositories' Lightning modules, around the backbone with its own rules.

    MDLM normalises by SUBS and writes into the backbone's output; DUO by log-softmax. Both take sigma (B, 1).
    """

    def __init__(self, backbone, *, mask_index=None, time_conditioning):
        super().__init__()
        self.backbone, self.vocab_size, self.time_conditioning = backbone, backbone.vocab_size, time_conditioning
        self.parameterization = "mean" if mask_index is None else "subs"
        if mask_index is not None:
            self.mask_index = mask_index

    def forward(self, x, sigma):
        assert sigma.ndim == 2
        logits = self.backbone(x, sigma.mean(-1))
        if self.parameterization == "mean":
            return logits.log_softmax(-1)
        logits[:, :, self.mask_index] += -1e6
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits[x != self.mask_index] = -1e6
        seen = x != self.mask_index
        logits[seen, x[seen]] = 0
        return logits


# --------------------------------------------------------------------------------------- masked LMs


def test_a_masked_language_model_denoises_and_samples(bert):
    model = MaskedLMDenoiser(bert, mask_id=12)
    assert (model.vocab_size, model.mask_id, model.time_conditioned) == (13, 12, False)
    ids = torch.randint(13, (2, 8))
    torch.testing.assert_close(model(ids, torch.rand(2)), bert(input_ids=ids).logits)
    torch.testing.assert_close(model(ids), model(ids, torch.ones(2)))
    process = MaskedDiffusion(model.vocab_size, model.mask_id)
    drawn = sample(model, process, (3, 8), steps=4, seed=0).ids
    assert drawn.shape == (3, 8) and (drawn != 12).all()


def test_it_trains_by_the_process_objective(bert):
    model, ids = MaskedLMDenoiser(bert, mask_id=12), torch.randint(12, (2, 8))
    process = MaskedDiffusion(13, 12)
    corrupted = process.corrupt(ids)
    process.nelbo(model(corrupted.x_t, corrupted.sigma), ids, corrupted.x_t, corrupted.t).mean().backward()
    assert bert.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_the_mask_of_a_llada_like_configuration_is_found(bert):
    bert.config.mask_token_id = 5
    assert MaskedLMDenoiser(bert).mask_id == 5


def test_a_module_that_returns_bare_logits_serves_too():
    model = MaskedLMDenoiser(nn.Embedding(5, 5), mask_id=4, vocab_size=5)
    assert model(torch.tensor([[0, 4]])).shape == (1, 2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 5}, r"mask_id was not passed, and is not an attribute mask_token_id[\s\S]*Pass mask_id="),
        ({"mask_id": 4}, "vocab_size was not passed, and is not"),
        ({"mask_id": 5, "vocab_size": 5}, r"mask_id must lie in \[0, V\)"),
    ],
)
def test_what_is_unknown_must_be_said(options, message):
    with pytest.raises(TokenDriftError, match=message):
        MaskedLMDenoiser(nn.Embedding(5, 5), **options)


def test_output_of_another_shape_is_refused():
    model = MaskedLMDenoiser(nn.Embedding(5, 6), mask_id=4, vocab_size=5)
    with pytest.raises(TokenDriftError, match=r"must return logits \(B, L, V\) = \(1, 2, 5\)[\s\S]*shifts or crops"):
        model(torch.tensor([[0, 4]]))
    with pytest.raises(TokenDriftError, match="x_t has ids from 0 to 5"):
        model(torch.tensor([[0, 5]]))


# ------------------------------------------------------------------------------- official repositories


def parts(backbone, *, masked):
    own = backbone(time_conditioning=not masked)
    module = OfficialModule(own, mask_index=12 if masked else None, time_conditioning=not masked)
    return own, OfficialDenoiser(module), MaskedDiffusion(13, 12) if masked else UniformDiffusion(13)


@pytest.mark.parametrize("masked", [True, False])
def test_log_probabilities_of_the_official_module_mean_what_raw_logits_mean(backbone, masked):
    own, model, process = parts(backbone, masked=masked)
    assert (model.vocab_size, model.mask_id, model.time_conditioned) == (13, process.mask_id, not masked)
    x0 = torch.randint(12, (4, 8))
    corrupted = process.corrupt(x0)
    x_t, t = corrupted.x_t, corrupted.t
    with torch.no_grad():
        theirs, ours = model(x_t, corrupted.sigma), own(x_t, corrupted.sigma)
    torch.testing.assert_close(process.nelbo(theirs, x0, x_t, t), process.nelbo(ours, x0, x_t, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(process.log_probs(theirs, x_t).exp(), process.log_probs(ours, x_t).exp())


def test_a_time_independent_official_module_needs_no_sigma(backbone):
    _, model, _ = parts(backbone, masked=True)
    ids = torch.full((1, 8), 12)
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids, torch.ones(1)))


@pytest.mark.parametrize("sigma", [None, torch.zeros(3), torch.zeros(2, 1)])
def test_a_time_conditioned_one_needs_one_sigma_a_row(backbone, sigma):
    _, model, _ = parts(backbone, masked=False)
    with pytest.raises(TokenDriftError, match=r"sigma must have shape \(B,\)"):
        model(torch.zeros(2, 8, dtype=torch.int64), sigma)


@pytest.mark.parametrize("kind", ["sedd", "score", "ar"])
def test_scores_and_next_token_models_are_refused(kind):
    module = OfficialModule(DiT(DiTConfig(13, 8, 16, 4, 1, 2)), time_conditioning=True)
    module.parameterization = kind
    with pytest.raises(TokenDriftError, match=rf"parameterization '{kind}': its output is not a distribution"):
        OfficialDenoiser(module)


# ----------------------------------------------------------------------- models of transformers as they come


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_layer=1, n_embd=16, n_head=2, n_positions=8)).eval()


def test_a_causal_model_is_refused_until_its_attention_is_said_to_be_bidirectional():
    model = gpt2()
    with pytest.raises(TokenDriftError, match=r"module is a causal language model[\s\S]*config.is_causal = False"):
        MaskedLMDenoiser(model, mask_id=12)
    model.config.is_causal = False
    assert MaskedLMDenoiser(model, mask_id=12).vocab_size == 13


def test_shifted_logits_are_moved_to_the_token_that_they_predict(bert):
    plain, shifted = MaskedLMDenoiser(bert, mask_id=12), MaskedLMDenoiser(bert, mask_id=12, shifted=True)
    ids = torch.randint(13, (2, 8))
    with torch.no_grad():
        assert torch.equal(shifted(ids)[:, 1:], plain(ids)[:, :-1])
        assert torch.equal(shifted(ids)[:, 0], plain(ids)[:, 0])


def test_a_compiled_model_shows_its_sizes(bert):
    assert MaskedLMDenoiser(torch.compile(bert, backend="eager"), mask_id=12).vocab_size == 13


@pytest.mark.parametrize("causal", [False, True])
def test_a_bare_model_of_transformers_is_refused_with_the_adapter(bert, causal):
    model, process, ids = gpt2() if causal else bert, MaskedDiffusion(13, 12), torch.randint(12, (2, 8))
    for use in (
        lambda: sample(model, process, (2, 8), steps=2, seed=0),
        lambda: process.corrupt(ids).denoise(model),
        lambda: Continuation(process)(model, ids),
    ):
        with pytest.raises(TokenDriftError, match=r"it is a model of transformers[\s\S]*MaskedLMDenoiser"):
            use()


def test_an_output_object_in_place_of_logits_is_recognised(bert):
    drift, ids = TokenDriftLoss.from_encoder(bert, mask_id=12, layers=(-1,)), torch.randint(12, (2, 8))
    with pytest.raises(TokenDriftError, match=r"logits must be a tensor[\s\S]*pass its \.logits"):
        drift(bert(ids), ids, noisy_ids=ids)


def test_a_denoiser_that_takes_no_head_or_no_soft_input_is_named(bert):
    model, ids = MaskedLMDenoiser(bert, mask_id=12), torch.randint(12, (2, 8))
    drift = TokenDriftLoss.from_encoder(bert, mask_id=12, layers=(-1,))
    with pytest.raises(TokenDriftError, match=r"keyword argument head[\s\S]*hold_logits at True"):
        Drift(MaskedDiffusion(13, 12), drift, hold_logits=False)(model, ids)
    soft = GaussianUniformDiffusion(13, 0.1).corrupt(ids)
    with pytest.raises(TokenDriftError, match="keyword argument embed"):
        soft.denoise(model)
