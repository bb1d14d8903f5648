"""Training checkpoints of the official repositories: weights and configuration come out, no code runs."""

import os
import pickle
import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tokendrift import TokenDriftError
from tokendrift.diffusion import Cosine, DuoCosine, Linear, LogLinear, MaskedDiffusion, UniformDiffusion
from tokendrift.models import load_denoiser, read_checkpoint
from tokendrift.models.lightning import StandIn, read_pickle

omegaconf = pytest.importorskip("omegaconf", reason="the official checkpoints hold its containers")

SIZES = {"hidden_size": 32, "cond_dim": 8, "length": 12, "n_blocks": 2, "n_heads": 4, "dropout": 0.2}


def mdlm_config(**changes):
    config = {
        "backbone": "dit",
        "parameterization": "subs",
        "time_conditioning": False,
        "model": {"name": "small", "type": "ddit", **SIZES},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "data": {"tokenizer_name_or_path": "gpt2", "cache_dir": "${cwd:}"},
        "trainer": {"devices": "${device_count:}", "max_steps": 1_000_000},
        "eval": {"lengths": [1, 2]},
    }
    return config | changes


def duo_config(**changes):
    algo = {"name": "duo", "backbone": "dit", "parameterization": "mean", "time_conditioning": True} | changes
    return {"algo": algo, "model": {"name": "small", **SIZES}, "noise": {"type": "log-linear", "eps": 1e-3}}


@pytest.fixture
def lightning(tmp_path, golden):
    """Write a checkpoint with the objects that Lightning's save_hyperparameters() puts beside the weights."""

    def write(config, *, fixture="dit_mdlm", ema=True, averaged=None, **extra):
        numbers = golden(fixture)
        state = OrderedDict(
            (key.replace("state_dict.", "backbone."), numbers[key].clone())
            for key in numbers.entry["keys"]  # in the order of the official module
            if key.startswith("state_dict.")
        )
        average = [tensor for name, tensor in state.items() if not name.endswith("inv_freq")]
        if ema:  # the golden weights are the averaged ones; the raw ones are something else
            state = OrderedDict(
                (name, tensor if name.endswith("inv_freq") else tensor + 1) for name, tensor in state.items()
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<eos>")
        checkpoint = {
            "epoch": 0,
            "global_step": 1_000_000,
            "pytorch-lightning_version": "2.2.1",
            "state_dict": OrderedDict({**state, "teacher.vocab_embed.embedding": torch.zeros(1)}),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 3e-4}]}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"config": omegaconf.OmegaConf.create(config), "tokenizer": tokenizer},
            **extra,
        }
        if ema:
            checkpoint["ema"] = {"decay": 0.9999, "num_updates": 5, "shadow_params": averaged or average}
        torch.save(checkpoint, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt", numbers

    return write


def test_the_averaged_weights_give_the_official_logits(lightning):
    path, numbers = lightning(mdlm_config())
    model, process = load_denoiser(path)
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), "no_time.logits")
    assert isinstance(process, MaskedDiffusion) and process.mask_id == 22 and process.schedule == LogLinear()
    assert (model.config.dropout, model.config.model_length, model.config.n_heads) == (0.2, 12, 4)
    assert read_checkpoint(path).weights == "averaged (EMA) weights of step 1000000"


def test_a_duo_checkpoint_becomes_a_time_conditioned_uniform_model(lightning):
    path, numbers = lightning(duo_config(), fixture="dit_duo")
    model, process = load_denoiser(path)
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), "ids.logits")
    assert isinstance(process, UniformDiffusion) and model.time_conditioned and model.mask_id is None


@pytest.mark.parametrize("ema", [True, False])
def test_raw_weights_are_taken_when_asked_for_or_alone(lightning, ema):
    path, numbers = lightning(mdlm_config(), ema=ema)
    model = load_denoiser(path, ema=False)[0]
    raw = numbers["state_dict.blocks.1.norm2.weight"] + (1 if ema else 0)
    assert torch.equal(model.blocks[1].norm2.weight, raw)
    assert read_checkpoint(path, ema=False).weights == "raw weights of step 1000000"


def test_compiled_modules_load_under_the_plain_names(lightning, tmp_path):
    path, numbers = lightning(mdlm_config())
    checkpoint = read_pickle(path)
    checkpoint["state_dict"] = OrderedDict(
        (name.replace("backbone.", "backbone._orig_mod."), tensor) for name, tensor in checkpoint["state_dict"].items()
    )
    torch.save({key: checkpoint[key] for key in ("state_dict", "ema")}, tmp_path / "compiled.ckpt")
    model = load_denoiser(tmp_path / "compiled.ckpt", config={"model_type": "mdlm"})[0]
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), "no_time.logits")


def test_without_readable_settings_the_sizes_come_from_the_weights_and_the_type_from_the_caller(lightning):
    path, numbers = lightning({}, hyper_parameters=None)
    with pytest.raises(
        TokenDriftError, match=r"must have model_type mdlm or DUO[\s\S]*config=\{'model_type': 'mdlm'\}"
    ):
        load_denoiser(path)
    model = load_denoiser(path, config={"model_type": "mdlm"})[0]
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), "no_time.logits")
    assert not model.time_conditioned


@pytest.mark.parametrize(
    "config",
    [
        {"algo": {"name": "didi_instruct", "backbone": "dit", "time_conditioning": False}, "model": SIZES},
        {"algo": {"name": "mdlm", "backbone": "hf_dit", "time_conditioning": False}, "model": SIZES},
        {"parameterization": {"name": "multi-round-sdtt"}, "time_conditioning": False}
        | {"model": SIZES | {"type": "ddit-orig"}},
    ],
    ids=["DiDi-Instruct", "IDLM", "SDTT"],
)
def test_checkpoints_of_distilled_masked_models_load(lightning, config):
    path, numbers = lightning(config)
    model, process = load_denoiser(path)
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), "no_time.logits")
    assert isinstance(process, MaskedDiffusion) and process.mask_id == 22


def test_a_reference_to_another_field_is_no_size(lightning):
    config = mdlm_config()
    config["model"]["length"] = "${data.length}"
    assert load_denoiser(lightning(config)[0])[0].config.model_length == 1024


@pytest.mark.parametrize(
    "settings",
    [
        omegaconf.OmegaConf.create({"config": mdlm_config()}),  # hyper_parameters that are OmegaConf's own
        {"config": omegaconf.OmegaConf.create(mdlm_config(model="${elsewhere}"))},
        {"config": mdlm_config(), "tokenizer": None},  # plain data
    ],
)
def test_settings_are_read_from_whatever_holds_them(lightning, settings):
    path, numbers = lightning({}, hyper_parameters=settings)
    model, process = load_denoiser(path)
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), "no_time.logits")
    assert isinstance(process, MaskedDiffusion)


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        (mdlm_config(noise={"type": "cosine"}), Cosine()),
        (mdlm_config(noise={"type": "cosinesqr"}), Cosine(power=2)),
        (mdlm_config(noise={"type": "linear", "sigma_min": 0.0, "sigma_max": 7.0}), Linear(0.0, 7.0)),
        (duo_config() | {"noise": {"type": "cosine", "eps": 1e-3}}, DuoCosine()),
    ],
)
def test_the_schedule_is_that_of_the_training_run(lightning, config, schedule):
    assert load_denoiser(lightning(config)[0])[1].schedule == schedule


def test_a_schedule_that_is_not_known_is_not_taken_for_another(lightning):
    path, _ = lightning(mdlm_config(noise={"type": "polynomial"}))
    with pytest.raises(TokenDriftError, match=r"schedule in config.json must be one of(.|\n)*polynomial"):
        load_denoiser(path)
    assert load_denoiser(path, config={"schedule": "Cosine"})[1].schedule == Cosine()


def test_a_bert_tokenizer_has_its_mask_at_103(lightning):
    path, _ = lightning(mdlm_config(data={"tokenizer_name_or_path": "bert-base-uncased"}))
    assert read_checkpoint(path).config["mask_id"] == 103


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "config",
    [mdlm_config(parameterization="sedd"), mdlm_config(backbone="dimamba"), duo_config(name="ar")],
)
def test_other_networks_and_objectives_are_refused(lightning, config):
    with pytest.raises(TokenDriftError, match=r"supported are 'dit' networks trained as distillation, duo, duo_base"):
        load_denoiser(lightning(config)[0])


def test_averaged_weights_that_do_not_pair_up_are_refused(lightning):
    with pytest.raises(TokenDriftError, match=r"do not match the 30 parameters: 2 tensors\n    vocab_embed"):
        load_denoiser(lightning(mdlm_config(), averaged=[torch.zeros(2), torch.zeros(3)])[0])


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {"encoder.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(TokenDriftError, match=r"no entry that starts with 'backbone\.'"):
        load_denoiser(tmp_path / "other.ckpt")
    torch.save({"step": 3}, tmp_path / "other.pt")
    with pytest.raises(TokenDriftError, match="holds neither a Lightning checkpoint nor named tensors"):
        load_denoiser(tmp_path / "other.pt", config={"model_type": "mdlm"})
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(TokenDriftError, match="it holds a list instead of named tensors"):
        load_denoiser(tmp_path / "list.pt")


class Attack:
    """Pickles to a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("function", "said"), [(os.system, r"(posix|nt|os)\.system"), (eval, r"(builtins|__builtin__)\.eval")]
)
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, name, legacy, function, said):
    mark = tmp_path / "ran"
    code = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    torch.save(
        {"state_dict": {"backbone.x": torch.zeros(1)}, "hyper_parameters": Attack(function, code)},
        tmp_path / name,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(TokenDriftError, match=r"is not loaded: [\s\S]*a pickle can run any code") as caught:
        load_denoiser(tmp_path / name)
    assert not mark.exists()
    if not legacy:
        assert caught.match(f"it wants to use {said}")


def test_a_bare_pickle_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Attack(os.system, f"touch {tmp_path / 'ran'}"), protocol=2))
    with pytest.raises(TokenDriftError, match="is not loaded"):
        load_denoiser(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


def test_what_stands_in_for_a_class_calls_nothing_of_it(tmp_path, monkeypatch):
    """A name within an expected package is replaced, not imported: even a function there stays untouched."""
    called = []
    module = SimpleNamespace(__name__="omegaconf.evil")

    def function(*arguments):
        called.append(arguments)

    function.__module__, function.__qualname__, function.__name__ = "omegaconf.evil", "run", "run"
    module.run = function
    monkeypatch.setitem(sys.modules, "omegaconf.evil", module)
    torch.save({"x": Attack(function, "now")}, tmp_path / "x.ckpt")
    allowed = torch.serialization.get_safe_globals()
    assert isinstance(read_pickle(tmp_path / "x.ckpt")["x"], StandIn)
    assert called == []
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
