"""The doctor: healthy models are told so, and each way of breaking one is named."""

import functools
import itertools
import json
import math
import shutil
from functools import partial
from pydoc_data import topics

import pytest
import torch
from commands import invoke
from safetensors.torch import load_file, save_file
from torch import nn

from tokendrift import TokenDriftError
from tokendrift.corpus import prose
from tokendrift.demo import PRETRAINED
from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.doctor import Diagnosis, diagnose, examine
from tokendrift.doctor.probes import Estimate, estimate, window_nelbo
from tokendrift.evaluation import validation_nelbo
from tokendrift.models import DiT, DiTConfig, load_denoiser
from tokendrift.models.tokenizer import find_tokenizer, load_tokenizer

TOKENS = 2048
DEFAULT_DOCUMENTS = examine._default_documents


@functools.cache
def documents():
    """The language reference alone: the rest of the default text takes seconds to read."""
    return [paragraph for text in topics.topics.values() for paragraph in prose(text)]


@pytest.fixture(autouse=True)
def _quick_documents(monkeypatch):
    monkeypatch.setattr(examine, "_default_documents", documents)


@pytest.fixture
def checkpoint(tmp_path):
    """Copy a shipped model with its tokenizer; changes to weights and configuration."""

    def make(kind, *, weights=None, config=None):
        folder = tmp_path / kind
        shutil.copytree(PRETRAINED / kind, folder)
        if weights is not None:
            torch.manual_seed(0)
            tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
            save_file(weights(tensors) or tensors, folder / "model.safetensors")
        if config:
            raw = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(raw | config))
        return folder

    return make


def failures(report):
    return {check.name: check.message for check in report.checks if check.verdict == "fail"}


# --------------------------------------------------------------------------------------------- health


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_a_healthy_model_is_told_so(checkpoint, kind):
    report = diagnose(checkpoint(kind), tokens=TOKENS)
    assert report.healthy and {check.verdict for check in report.checks} == {"ok", "note"}
    found = report.figures
    assert found["perplexity"] < 0.5 * found["unigram_perplexity"] and found["tokens"] == TOKENS
    assert report.checkpoint["parameters"] > 1_000_000


def test_the_seed_gives_the_noise(checkpoint):
    folder = checkpoint("masked")
    first, same, other = (diagnose(folder, tokens=1024, seed=seed).figures["nelbo"] for seed in (1, 1, 2))
    assert first == same != other


def test_a_student_in_the_format_of_sdtt_is_examined_like_any_other(checkpoint):
    folder = checkpoint("masked")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"backbone.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    sizes = json.loads((folder / "config.json").read_text())
    names = {"hidden_size": "hidden_dim", "length": "model_length", "cond_dim": "cond_dim", "n_blocks": "n_blocks"}
    own = {theirs: sizes[ours] for theirs, ours in (names | {"n_heads": "n_heads", "dropout": "dropout"}).items()}
    run = {"parameterization": {"name": "multi-round-sdtt"}, "model": own | {"type": "ddit-orig"}}
    (folder / "config.json").write_text(json.dumps(run | {"time_conditioning": False}))
    report = diagnose(folder, tokens=1024)
    assert report.healthy and report.checkpoint["configuration"]["mask_id"] == sizes["mask_id"]


@pytest.mark.parametrize(("values", "verdict"), [([4.0, 4.0, 15.0], "note"), ([9.0, 9.0, 9.1], "fail")])
def test_few_tokens_give_no_verdict_on_a_noisy_figure(values, verdict):
    model, process = load_denoiser(PRETRAINED / "masked")
    tokenizer, report = load_tokenizer(PRETRAINED / "tokenizer.json"), Diagnosis({})
    found = torch.tensor(values, dtype=torch.float64)
    windows = torch.zeros(3, 32, dtype=torch.int64)
    examine.check_nelbo(
        report, model, process, windows, tokenizer, progress=print, nelbo=lambda *args, **options: found[: len(args[2])]
    )
    (nelbo, *_) = report.checks
    assert nelbo.verdict == verdict and ("too few tokens to tell" in nelbo.message) == (verdict == "note")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "nelbo"), [("masked", 3.80), ("uniform", 4.30)])
def test_the_default_text_gives_the_nelbo_that_the_demo_measures(checkpoint, kind, nelbo, monkeypatch):
    """Against `validation_nelbo` on the demo's held-out windows: other windows of the same text."""
    monkeypatch.setattr(examine, "_default_documents", DEFAULT_DOCUMENTS)
    found = diagnose(checkpoint(kind), tokens=65_536).figures
    assert abs(found["nelbo"] - nelbo) < 4 * found["nelbo_standard_error"] < 0.3


# ---------------------------------------------------------------------------------------- broken ones


def reinitialised(part):
    """Replace the weights of a part by what an unfilled network of transformers holds: normal, 0.02."""

    def change(tensors):
        for name, tensor in tensors.items():
            if name.startswith(f"backbone.{part}") and tensor.ndim == 2:
                tensor.normal_(std=0.02)

    return change


def with_shuffled_vocabulary(tensors):
    order = torch.randperm(1024)
    for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
        tensor = tensors[f"backbone.{name}"]
        tensor[:1024] = tensor[order]


def without_context(tensors):
    for name, tensor in tensors.items():
        if "blocks" in name and "attn_out" in name:
            tensor.zero_()


def with_nan(tensors):
    tensors["backbone.blocks.2.mlp.0.bias"][3] = math.nan


def with_no_head(tensors):
    tensors["backbone.output_layer.linear.weight"].zero_()


def cut_off(tensors):
    return {name: tensor for name, tensor in tensors.items() if "blocks.3.mlp" not in name}


@pytest.mark.parametrize(
    ("kind", "weights", "config", "where", "said"),
    [
        ("masked", reinitialised(""), None, "what is wrong", "weights not loaded: perplexity "),
        pytest.param(
            *("uniform", reinitialised(""), None, "what is wrong", "weights not loaded: perplexity "),
            marks=pytest.mark.slow,
        ),
        ("masked", reinitialised("blocks"), None, "what is wrong", "wrong vocabulary, or weights not loaded"),
        ("masked", without_context, None, "what is wrong", "does not use context: some weights are damaged"),
        pytest.param(
            *("masked", with_shuffled_vocabulary, None, "what is wrong", "wrong vocabulary, or weights not loaded"),
            marks=pytest.mark.slow,
        ),
        ("uniform", with_shuffled_vocabulary, None, "what is wrong", "wrong vocabulary, or weights not loaded"),
        ("masked", with_nan, None, "weights are finite", "NaN or infinite: blocks.2.mlp.0.bias"),
        ("masked", with_no_head, None, "weights are trained", "the output layer is all zeros"),
        ("uniform", cut_off, None, "weights fit the configuration", "missing blocks.3.mlp.2.weight (128, 512)"),
        ("uniform", None, {"hidden_dim": 256}, "weights fit the configuration", "expected (1024, 256)"),
    ],
)
def test_broken_weights_are_named(checkpoint, kind, weights, config, where, said):
    tokens = 2 * TOKENS if weights is without_context else TOKENS  # it takes more of them to tell
    found = failures(diagnose(checkpoint(kind, weights=weights, config=config), tokens=tokens))
    assert said in found[where]
    assert ("what is wrong" in found) == ("NELBO" in found)


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("uniform", {"time_conditioning": False}, "set time_conditioning to true"),
        ("uniform", {"model_type": "mdlm", "mask_id": 1023}, "this is a uniform-state model. Set model_type to DUO"),
        ("masked", {"model_type": "DUO"}, "this is a masked model (mask id 1024). Set model_type to mdlm"),
        ("masked", {"mask_id": 700}, "wrong mask id: the network takes 1024 for the mask, not 700"),
    ],
)
def test_a_wrong_configuration_is_told_from_the_one_that_works(checkpoint, kind, config, said):
    report = diagnose(checkpoint(kind, config=config), tokens=2 * TOKENS)
    assert said in failures(report)["what is wrong"]
    assert report.figures["perplexity_otherwise"] < 100 < report.figures["unigram_perplexity"]


class TrainedOnTime(nn.Module):
    """A network trained by code that passed t where sigma belongs: right when told t."""

    time_conditioned = True

    def __init__(self, model, process):
        super().__init__()
        self.model, self.process, self.config = model, process, model.config
        self.output_layer = model.output_layer

    def forward(self, x_t, told):
        return self.model(x_t, self.process.sigma(told.clamp(max=1.0)))


def test_a_network_that_reads_the_time_itself_is_noticed(monkeypatch):
    model, process = load_denoiser(PRETRAINED / "uniform")
    tokenizer = load_tokenizer(PRETRAINED / "tokenizer.json")
    windows = examine._windows(documents(), tokenizer, process, 32, 2 * TOKENS)
    report = Diagnosis({"source": "x"})
    examine.check_nelbo(report, TrainedOnTime(model, process), process, windows, tokenizer, print)
    assert "reads its second argument as the time t, not as sigma" in failures(report)["what is wrong"]


def test_a_tokenizer_that_does_not_fit_is_noticed(checkpoint):
    folder = checkpoint("uniform")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"] |= {f"extra{place}": 1024 + place for place in range(3)}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    message = failures(diagnose(folder, tokens=TOKENS))["vocabulary"]
    assert "has 1027 entries, the model 1024: some ids would be out of range" in message


def test_the_mask_is_held_against_the_tokenizer(checkpoint):
    tokenizer = load_tokenizer(PRETRAINED / "tokenizer.json")
    report = Diagnosis({})
    assert examine.check_tokenizer(report, MaskedDiffusion(1025, 700), tokenizer, "here")
    assert "700 is an ordinary token of the tokenizer" in failures(report)["mask id"]
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    report = Diagnosis({})
    examine.check_tokenizer(report, MaskedDiffusion(1025, 1023), tokenizer, "here")
    assert "the model has 1023, the tokenizer's mask token is 1024" in failures(report)["mask id"]
    report = Diagnosis({})
    examine.check_tokenizer(report, MaskedDiffusion(1025, 1024), tokenizer, "here")
    assert report.healthy


# ---------------------------------------------------------------------------------- published values


@pytest.mark.parametrize(
    ("process", "perplexity", "source", "verdict", "said"),
    [
        (MaskedDiffusion(50258), 23.9, "m", "ok", "close: MDLM has 23.2 on OpenWebText with GPT-2 tokens"),
        (UniformDiffusion(50258), 25.0, "m", "ok", "close: DUO has 25.2 on OpenWebText"),
        (
            MaskedDiffusion(50258),
            33.0,
            "m",
            "note",
            "23.2 on OpenWebText with GPT-2 tokens, which can only be compared on that text",
        ),
        (UniformDiffusion(50258), 70.0, "s-sahoo/duo-distilled", "note", "distilled models trade likelihood"),
    ],
)
def test_the_published_value_is_compared_where_it_can_be(process, perplexity, source, verdict, said):
    with torch.device("meta"):
        model = DiT(DiTConfig(50258, 1024, 8, 4, 1, 1))
    report = Diagnosis({"source": source})
    examine._compare(report, model, process, Estimate(math.log(perplexity), 0.01))
    assert (report.checks[0].verdict, said in report.checks[0].message) == (verdict, True)
    examine._compare(report, model, process, Estimate(math.log(perplexity), math.inf))  # of a single window
    assert report.checks[1].verdict == verdict


# ---------------------------------------------------------------------------------------- measurement


def test_the_count_of_masks_gives_the_same_bound_as_the_time(backbone):
    """L = 3: the expectation over all sets of masks, against the integral over time of the process's own loss."""
    model, process, x0 = backbone(vocab_size=5), MaskedDiffusion(5), torch.tensor([[1, 3, 0]])
    points, weights = torch.linspace(0.0005, 0.9995, 1000).double(), 1e-3
    integral = 0.0
    for masked in itertools.product([False, True], repeat=3):
        mask = torch.tensor([masked])
        x_t = torch.where(mask, 4, x0)
        with torch.no_grad():
            loss = process.nelbo(model(x_t), x0, x_t, torch.ones(1)).mean().item()  # weight 1/t left out at t = 1
        chance = points ** mask.sum() * (1 - points) ** (~mask).sum()
        integral += (chance / points * loss).sum().item() * weights
    found = estimate(window_nelbo(model, process, x0.repeat(4000, 1)))
    assert found.error < 0.03 and abs(found.mean - integral) < 4 * found.error


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_it_agrees_with_the_validation_nelbo(kind):
    model, process = load_denoiser(PRETRAINED / kind)
    ids = torch.randint(1024, (128, 32), generator=torch.Generator().manual_seed(0))
    ids[:, 1::2] = ids[:, ::2]  # something to know
    found = estimate(window_nelbo(model, process, ids))
    plain = estimate(window_nelbo(model, process, ids, counted=False, seed=1))
    assert abs(found.mean - plain.mean) < 4 * math.hypot(found.error, plain.error)
    assert abs(validation_nelbo(model, process, ids, seed=2) - plain.mean) < 6 * plain.error
    assert found.error < (0.5 * plain.error if kind == "masked" else 2 * plain.error)


def test_the_error_of_a_stratified_mean_leaves_out_the_trend():
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    found = estimate(torch.linspace(0, 100, 1000).double() + noise)
    assert math.isclose(found.error, 1 / math.sqrt(1000), rel_tol=0.1)
    assert estimate(torch.ones(1)).error == math.inf


# -------------------------------------------------------------------------------------------- command


@pytest.fixture
def run():
    return partial(invoke, "doctor")


def test_the_command_prints_tables_and_leaves_with_zero(checkpoint, run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(documents()[:400]))
    result = run(checkpoint("masked"), "--text", text, "--tokens", 4096)
    assert result.exit_code == 0
    for part in ("1,172,673", "MaskedDiffusion(1025, mask_id=1024", "hidden_dim 128", "ok    NELBO", "4,096 tokens"):
        assert part in result.stdout


def test_json_holds_the_same_and_a_finding_leaves_with_one(checkpoint, run):
    result = run(checkpoint("masked", weights=with_no_head), "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["healthy"] is False
    assert report["checkpoint"]["configuration"]["mask_id"] == 1024
    assert report["checks"][-1]["name"] == "weights are trained"


def test_without_a_tokenizer_it_says_what_it_cannot_check(run, checkpoint):
    folder = checkpoint("masked")
    (folder / "tokenizer.json").unlink()
    result = run(folder)
    assert result.exit_code == 0 and "pass one with --tokenizer to check it and to measure the NELBO" in result.stdout


def test_text_that_is_too_short_is_a_note(run, tmp_path):
    (tmp_path / "text.txt").write_text("Too short.")
    result = run(PRETRAINED / "masked", "--tokenizer", PRETRAINED / "tokenizer.json", "--text", tmp_path / "text.txt")
    assert result.exit_code == 0 and "the text is too short" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere does not exist"),
        ([PRETRAINED / "masked", "--device", "abacus"], "device 'abacus' cannot be used"),
        ([PRETRAINED], "has no config.json"),
        ([PRETRAINED / "masked", "--text", "none.txt"], "cannot be read"),
        ([PRETRAINED / "masked", "--tokenizer", PRETRAINED.parent], "no tokenizer can be read from"),
    ],
)
def test_what_cannot_be_examined_leaves_with_two(run, arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------ tokenizers


def test_a_lone_tokenizer_file_knows_its_end_of_text():
    tokenizer = load_tokenizer(PRETRAINED / "tokenizer.json")
    assert (len(tokenizer), tokenizer.eos_token_id) == (1024, 0)


def test_a_folder_without_a_tokenizer_has_none_unless_its_vocabulary_is_that_of_gpt2(tmp_path, monkeypatch):
    asked = []

    def gpt2(name, *, fetch):
        asked.append((name, fetch))
        raise TokenDriftError("offline")

    monkeypatch.setattr("tokendrift.models.tokenizer.load_tokenizer", gpt2)
    assert find_tokenizer(tmp_path, 1024) is None and asked == []
    assert find_tokenizer(tmp_path, 50258) is None and asked == [("gpt2", False)]
