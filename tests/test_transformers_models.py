"""Masked models of transformers on their whole way: loss, training, samples, figures, saving and loading."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tokendrift import TokenDriftError, TokenDriftLoss
from tokendrift.diffusion import MaskedDiffusion
from tokendrift.evaluation import GenerativePerplexity, evaluate
from tokendrift.models import MaskedLMDenoiser, load_denoiser, save_denoiser
from tokendrift.sampling import sample
from tokendrift.training import Drift, LoopConfig, train, windows

transformers = pytest.importorskip("transformers")
V, WIDTH, LENGTH, MASK = 13, 16, 8, 12


class SomeConfig(transformers.PretrainedConfig):
    model_type = "some"

    def __init__(self, vocab_size=V, mask_token_id=MASK, **options):
        super().__init__(**options)
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id


class Body(nn.Module):
    """What both families have inside, with the name of LLaDA for its input."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(V, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True)

    def forward(self, input_ids=None, input_embeddings=None):
        first = self.wte(input_ids) if input_embeddings is None else input_embeddings
        return first, self.block(first)


class LLaDAModelLM(transformers.PreTrainedModel):
    """As the model of that name: its body has no ``inputs_embeds``, the model itself has."""

    config_class, base_model_prefix = SomeConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.model, self.head = Body(), nn.Linear(WIDTH, V)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.wte

    def forward(
        self, input_ids=None, inputs_embeds=None, attention_mask=None, output_hidden_states=False, return_dict=True
    ):
        hidden = self.model(input_ids, inputs_embeds)
        return SimpleNamespace(logits=self.head(hidden[-1]), hidden_states=hidden)


class DreamModel(LLaDAModelLM):
    """The same with the name of Dream, whose logits belong to the next token."""


def with_adapters():
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH}
    config = transformers.BertConfig(vocab_size=V, max_position_embeddings=LENGTH, mask_token_id=MASK, **sizes)
    model = transformers.BertForMaskedLM(config)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"]))


MODELS = {"llada": lambda: LLaDAModelLM(SomeConfig()), "dream": lambda: DreamModel(SomeConfig()), "peft": with_adapters}


@pytest.mark.parametrize("kind", MODELS)
def test_from_the_loss_to_a_saved_model(kind, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]()
    denoiser = MaskedLMDenoiser(model, mask_id=MASK, shifted=kind == "dream")
    process = MaskedDiffusion(denoiser.vocab_size, denoiser.mask_id)
    drift = TokenDriftLoss.from_encoder(denoiser)
    assert drift.mask_id == MASK and len(drift.embedding) == V
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = torch.randint(MASK, (400,))
    batches = windows(text, LENGTH, 4, seed=0)
    records = train(denoiser, Drift(process, drift, 0.1), batches, LoopConfig(2, 4, 1e-2, warmup=0, ema=0.0))
    assert records[-1]["drift"] > 0 and any(not torch.equal(before[n], t) for n, t in model.state_dict().items())

    ids = sample(denoiser, process, (6, LENGTH), steps=4, seed=0).ids
    judge = GenerativePerplexity(lambda ids, mask: torch.zeros(*ids.shape, V), protocol="all")
    found = evaluate({"samples": ids}, judge, real=text[: 6 * LENGTH].view(6, LENGTH), resamples=20)
    assert found["samples"].measures.gen_ppl.estimate == pytest.approx(V)

    folder = tmp_path / "refined"
    save_denoiser(denoiser, folder, process)
    if kind == "peft":
        from peft import PeftModel

        again = PeftModel.from_pretrained(transformers.BertForMaskedLM(model.get_base_model().config), folder)
        weights = again.state_dict()
        assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items() if "lora" in n)
    else:
        again = MaskedLMDenoiser(type(model).from_pretrained(folder), shifted=kind == "dream")
        assert torch.equal(again(ids), denoiser(ids))
    with pytest.raises(TokenDriftError, match="base model" if kind == "peft" else "MaskedLMDenoiser"):
        load_denoiser(folder)  # the base model was never saved, and the class is known to this file alone


def test_a_model_with_code_of_its_own_is_named_by_its_automatic_class(tmp_path):
    model = LLaDAModelLM(SomeConfig(auto_map={"AutoConfig": "configuration.C", "AutoModel": "modeling.M"}))
    model.save_pretrained(tmp_path)
    with pytest.raises(TokenDriftError, match=r"code of its own, modeling\.M[\s\S]*'trust_remote_code': True"):
        load_denoiser(tmp_path)
