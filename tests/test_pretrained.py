"""Masked language models of transformers, their own code and adapters of peft among them, through every command."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from commands import invoke
from torch import nn

from tokendrift import TokenDriftError, TokenDriftLoss
from tokendrift.demo import PRETRAINED
from tokendrift.diffusion import Cosine, MaskedDiffusion
from tokendrift.models import MaskedLMDenoiser, load_denoiser, save_denoiser
from tokendrift.models.checkpoints import empty_like
from tokendrift.models.tokenizer import encode, load_tokenizer
from tokendrift.sampling import sample
from tokendrift.training import make_config, refine

transformers = pytest.importorskip("transformers")
TOKENIZER, V, MASK, LENGTH = PRETRAINED / "tokenizer.json", 1025, 1024, 12
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = (
    "the",
    "drift",
    "of",
    "a",
    "token",
    "pulls",
    "it",
    "to",
    "real",
    "text",
    "and",
    "away",
    "from",
    "what",
    "model",
)
TRUST = {"trust_remote_code": True}
CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class TinyConfig(PretrainedConfig):
    model_type = "tiny-NAME"

    def __init__(self, vocab_size=9, mask_token_id=8, max_sequence_length=12, **options):
        super().__init__(**options)
        self.vocab_size, self.mask_token_id, self.max_sequence_length = vocab_size, mask_token_id, max_sequence_length


class NAME(PreTrainedModel):
    config_class, base_model_prefix = TinyConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(
        self, input_ids=None, inputs_embeds=None, attention_mask=None, output_hidden_states=False, return_dict=True
    ):
        first = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = (first, self.block(first))
        return MaskedLMOutput(logits=self.head(hidden[-1]), hidden_states=hidden)
"""


@pytest.fixture(scope="module")
def text():
    """Return text of few words."""
    draw = random.Random(1)
    return "\n".join(" ".join(draw.choices(WORDS, k=9)) for _ in range(80))


@pytest.fixture(scope="module")
def tokenizer():
    """Return a tokenizer with a mask token."""
    found = load_tokenizer(TOKENIZER)
    found.add_special_tokens({"mask_token": "<mask>"})
    assert found.mask_token_id == MASK
    return found


def with_code(folder, name, automatic):
    """Write a model that brings its own code, as LLaDA and Dream do."""
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(CODE.replace("NAME", name), encoding="utf-8")
    stated = {"AutoConfig": "modeling_tiny.TinyConfig", automatic: f"modeling_tiny.{name}"}
    sizes = {"model_type": f"tiny-{name}", "vocab_size": V, "mask_token_id": MASK}
    (folder / "config.json").write_text(json.dumps(sizes | {"auto_map": stated}), encoding="utf-8")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return getattr(transformers, automatic).from_config(config, trust_remote_code=True)


def bert(**options):
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, max_position_embeddings=LENGTH, **options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text, tokenizer):
    """Return what writes a checkpoint of a kind once, with its tokenizer, and returns its folder and its options."""
    place = tmp_path_factory.mktemp("pretrained")
    ids = torch.tensor(encode(tokenizer, [text])[0])
    counts = torch.bincount(ids, minlength=V) + 0.01

    def write(kind):
        folder, options = place / kind, TRUST if kind in ("llada", "dream") else {}
        if folder.exists():
            return folder, options
        torch.manual_seed(0)
        if kind == "bert":
            model = bert()
            with torch.no_grad():  # it knows the frequencies of the words
                model.cls.predictions.bias.copy_(counts.log())
        elif kind == "modernbert":
            special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}
            config = transformers.ModernBertConfig(**SIZES, max_position_embeddings=LENGTH, **special)
            model = transformers.ModernBertForMaskedLM(config)
        elif kind == "lora":
            peft = pytest.importorskip("peft")
            base = transformers.BertForMaskedLM.from_pretrained(write("bert")[0])
            model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"]))
        else:
            name, automatic = {"llada": ("LLaDAModelLM", "AutoModel"), "dream": ("DreamModel", "AutoModel")}[kind]
            model = with_code(folder, name, automatic)
        model.save_pretrained(folder)
        if kind != "lora":
            tokenizer.save_pretrained(folder)
        return folder, options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place / "modules"))
        yield write


KINDS = ["bert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("modernbert", "llada", "dream", "lora"))]


def fields(options):
    return [part for name in options for part in ("--checkpoint-config", f"{name}=true")]


def settings(folder, text_file, output, options, **changes):
    values = {
        "checkpoint": str(folder), "output": str(output), "text": (str(text_file),), "documents": "line",
        "checkpoint_config": tuple(f"{name}=true" for name in options), "shuffle": 8, "steps": 2, "batch_size": 4,
        "micro_batch": 4, "warmup": 0, "learning_rate": 1e-2, "ema": 0.5, "checkpoint_every": 1, "evaluate_samples": 2,
        "evaluate_nfe": (2,), "tensorboard": False,
    }  # fmt: skip
    return make_config(values=values | changes)


OBJECTIVES = {
    "pairs": {"objective": "pairs", "pair_sequences": 8},
    "drift": {"objective": "drift", "queue_size": 8, "dropout": 0.0},
    "matching": {"objective": "matching", "pair_sequences": 8, "auxiliary_rank": 2, "dropout": 0.0},
}
CASES = [
    pytest.param(kind, objective, marks=[] if (kind, objective) == ("bert", "drift") else [pytest.mark.slow])
    for kind in ("bert", "modernbert", "llada", "dream", "lora")
    for objective in OBJECTIVES
]


@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_refine_resumes_to_the_bit_and_writes_what_loads(folders, text, tmp_path, kind, objective):
    folder, options = folders(kind)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    whole, broken = (
        settings(folder, tmp_path / "text.txt", tmp_path / name, options, **OBJECTIVES[objective])
        for name in ("whole", "broken")
    )

    def stop(step):
        raise KeyboardInterrupt

    refine(whole, progress=False)
    with pytest.raises(KeyboardInterrupt):
        refine(broken, progress=False, on_step=stop)
    refine(broken, progress=False)
    before, (model, process) = load_denoiser(folder, config=options)[0], load_denoiser(whole.output, config=options)
    again, _ = load_denoiser(broken.output, config=options)
    assert model.config == before.config and repr(process) == repr(MaskedDiffusion(V, MASK))
    weights, other, first = model.state_dict(), again.state_dict(), before.state_dict()
    assert weights.keys() == first.keys() and all(torch.equal(other[name], weights[name]) for name in weights)
    changed = {name for name in weights if not torch.equal(weights[name], first[name])}
    assert changed and (kind != "lora" or all("lora_" in name for name in changed))
    assert (tmp_path / "whole" / "tokenizer.json").is_file() and (tmp_path / "whole" / "README.md").is_file()
    if kind == "lora":  # neither the checkpoints nor the folder hold the base model
        assert not (tmp_path / "whole" / "model.safetensors").exists()
        (stored,) = (tmp_path / "whole" / "checkpoints").glob("step-*2/model.safetensors")
        assert stored.stat().st_size < (folders("bert")[0] / "model.safetensors").stat().st_size / 4
    elif options:
        theirs = transformers.AutoModel.from_pretrained(whole.output, trust_remote_code=True)
        assert theirs.state_dict().keys() == model.module.state_dict().keys()
    else:
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(whole.output)
        assert all(torch.equal(tensor, weights[f"module.{n}"]) for n, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_saved_and_an_encoder(folders, tmp_path, kind):
    folder, options = folders(kind)
    model, process = load_denoiser(folder, config=options)
    assert (model.vocab_size, model.mask_id, model.config.model_length) == (V, MASK, LENGTH)
    assert model.config.shifted is (kind == "dream") and not model.training
    assert sample(model, process, (2, LENGTH), steps=2, seed=0).ids.max() < MASK
    drift, ids = TokenDriftLoss.from_encoder(model), torch.randint(MASK, (4, LENGTH))
    noisy = process.corrupt(ids)
    assert drift(model(noisy.x_t), ids, noisy_ids=noisy.x_t).isfinite()
    save_denoiser(model, tmp_path / "saved", MaskedDiffusion(V, MASK, Cosine()))
    again, kept = load_denoiser(tmp_path / "saved", config=options)
    assert repr(kept) == repr(MaskedDiffusion(V, MASK, Cosine())) and again.config == model.config
    assert torch.equal(again(ids), model(ids))
    save_denoiser(again, tmp_path / "saved", dtype=torch.bfloat16)  # into a folder that exists
    assert load_denoiser(tmp_path / "saved", config=options)[0](ids).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_sample_and_evaluate_take_it(folders, text, tmp_path, kind):
    folder, options = folders(kind)
    (tmp_path / "real.txt").write_text(text, encoding="utf-8")
    drawn = invoke("sample", folder, "-o", tmp_path / "s.jsonl", "-n", 2, "--steps", 2, *fields(options))
    assert drawn.exit_code == 0, drawn.output
    lines = (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(json.loads(lines[1])["ids"]) == LENGTH and json.loads(lines[1])["text"]
    found = invoke(
        "evaluate", "--checkpoint", f"model={folder}", "--nfe", 2, "-n", 4, "--real", tmp_path / "real.txt",
        "--judge", PRETRAINED / "judge", "--judge-tokenizer", TOKENIZER, "--device", "cpu", "--resamples", 20,
        "--json", tmp_path / "report.json", *fields(options),
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "model" in found.output


def test_doctor_finds_nothing_wrong_and_notices_shifted_logits(folders, text, tmp_path):
    folder, _ = folders("bert")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    common = ("doctor", folder, "--text", tmp_path / "text.txt", "--tokens", 600, "--device", "cpu")
    found = invoke(*common)
    assert found.exit_code == 0, found.output
    assert "mask id" in found.output and "fail" not in found.output
    wrong = invoke(*common, "--checkpoint-config", "mask_id=3")
    assert wrong.exit_code == 1 and "the tokenizer's mask token is 1024" in wrong.output


class NextToken(nn.Module):
    """Logits of the token after each position, as of a model that was made from a causal one."""

    def forward(self, ids):
        return 9.0 * nn.functional.one_hot((ids + 2) % 5, 5).float()


def test_the_doctor_says_that_logits_are_shifted():
    from tokendrift.doctor import probes

    model, ids = MaskedLMDenoiser(NextToken(), mask_id=4, vocab_size=5), torch.zeros(1, 4, dtype=torch.int64)
    (other,) = probes.sigma_alternatives(model, MaskedDiffusion(5, 4))
    assert other.diagnosis.endswith("belong to the token after it: set shifted to true")
    assert torch.equal(other.model(ids)[:, 1:], model(ids)[:, :-1]) and not model.config.shifted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "dream", "lora"])
def test_probe_takes_it(folders, text, tmp_path, kind):
    folder, options = folders(kind)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = invoke(
        "probe", folder, "--text", tmp_path / "text.txt", "--judge", PRETRAINED / "judge", "--judge-tokenizer",
        TOKENIZER, "--prompts", 4, "--draws", 1, "--device", "cpu", *fields(options),
    )  # fmt: skip
    assert found.exit_code == 0, found.output


# ---------------------------------------------------------------------------------------------------------- errors


def test_code_of_a_model_is_run_only_if_it_is_trusted(folders, tmp_path):
    folder, _ = folders("dream")
    for refused in ({}, {"trust_remote_code": False}):
        with pytest.raises(TokenDriftError, match=r"runs code of its own, modeling_tiny\.DreamModel[\s\S]*=true"):
            load_denoiser(folder, config=refused)
    with pytest.raises(TokenDriftError, match="trust_remote_code must be true or false"):
        load_denoiser(folder, config={"trust_remote_code": "yes"})
    (folder / "tokendrift.json").write_text('{"trust_remote_code": true}', encoding="utf-8")  # it cannot say so itself
    try:
        assert invoke("doctor", folder).exit_code == 2
    finally:
        (folder / "tokendrift.json").unlink()


def test_what_is_missing_or_does_not_fit_is_named(folders, tmp_path):
    folder, _ = folders("bert")
    transformers.BertModel.from_pretrained(folder).save_pretrained(tmp_path / "headless")
    with pytest.raises(TokenDriftError, match=r"lacks weights of BertForMaskedLM: cls\.predictions"):
        load_denoiser(tmp_path / "headless", config={"mask_id": MASK})
    bert().save_pretrained(tmp_path / "alone")
    with pytest.raises(TokenDriftError, match=r"does not state the mask[\s\S]*--checkpoint-config mask_id=ID"):
        load_denoiser(tmp_path / "alone")
    model, _ = load_denoiser(tmp_path / "alone", config={"mask_id": 7, "model_length": 5, "shifted": True})
    assert (model.mask_id, model.config.model_length, model.config.shifted) == (7, 5, True)
    (tmp_path / "alone" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n", encoding="utf-8")
    assert load_denoiser(tmp_path / "alone")[0].mask_id == 4
    with pytest.raises(TokenDriftError, match="does not take: n_heads"):
        load_denoiser(folder, config={"n_heads": 2})
    with pytest.raises(TokenDriftError, match="more tokens than the model has positions, 12"):
        load_denoiser(folder)[0](torch.zeros(1, LENGTH + 1, dtype=torch.int64))
    causal = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(causal).save_pretrained(tmp_path / "causal")
    with pytest.raises(TokenDriftError, match="not known as a masked language model"):
        load_denoiser(tmp_path / "causal")
    with pytest.raises(TokenDriftError, match="pass the folder of the model"):
        load_denoiser(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "dropout can only be 0 or that of the model"),
        ({"objective": "matching", "random_input": 8}, "random_input needs a DiT"),
    ],
)
def test_settings_that_need_another_network_are_refused(folders, text, tmp_path, changes, message):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    options = {"objective": "pairs"} | changes
    with pytest.raises(TokenDriftError, match=message):
        refine(settings(folders("bert")[0], tmp_path / "text.txt", tmp_path / "run", {}, **options), progress=False)


def test_positions_before_the_padding_id_do_not_count():
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=LENGTH + 2, pad_token_id=1)
    model = MaskedLMDenoiser(transformers.RobertaForMaskedLM(config).eval(), mask_id=MASK)
    assert model.config.model_length == LENGTH
    assert model(torch.full((1, LENGTH), 5)).shape == (1, LENGTH, V)


def test_a_copy_without_weights_has_the_names_and_shapes_of_the_model(backbone):
    model = backbone()
    empty = empty_like(model)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_dropout_of_zero_keeps_the_module_in_evaluation_mode():
    model = MaskedLMDenoiser(bert(), mask_id=MASK)
    assert model.trainable_copy().train().module.training and not model.trainable_copy(0.0).train().module.training
    assert math.isclose(model.trainable_copy(0.0).module.bert.embeddings.dropout.p, 0.1)
