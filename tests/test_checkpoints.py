"""Checkpoints: what is saved comes back, and what does not fit is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokendrift import TokenDriftError
from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.models import DiT, DiTConfig, load_denoiser, save_denoiser


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DiT(DiTConfig(vocab_size=13, model_length=8, hidden_dim=16, cond_dim=4, n_blocks=2, n_heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # the zero-initialised layers too
    return model.eval()


@pytest.mark.parametrize("process", [MaskedDiffusion(13, 4), UniformDiffusion(13)], ids=["masked", "uniform"])
def test_a_saved_model_loads_to_the_same_function_and_process(tmp_path, model, process):
    save_denoiser(model, tmp_path / "model", process)
    loaded, found = load_denoiser(tmp_path / "model")
    ids = torch.arange(8)[None] % 13
    torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=0)
    assert not loaded.training and loaded.config == model.config
    assert type(found) is type(process) and found.mask_id == process.mask_id and found.vocab_size == 13
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_tensors_carry_the_names_of_the_released_checkpoints(tmp_path, model):
    save_denoiser(model, tmp_path, MaskedDiffusion(13))
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "backbone.vocab_embed.embedding" in names and "backbone.blocks.1.adaLN_modulation.weight" in names


def test_half_precision_on_disk_comes_back_as_float32(tmp_path, model):
    save_denoiser(model, tmp_path, UniformDiffusion(13), dtype=torch.float16)
    assert load_file(tmp_path / "model.safetensors")["backbone.vocab_embed.embedding"].dtype == torch.float16
    assert {parameter.dtype for parameter in load_denoiser(tmp_path)[0].parameters()} == {torch.float32}


def test_missing_extra_and_misshapen_tensors_are_all_listed(tmp_path, model):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.stray"] = torch.zeros(3)
    del tensors["backbone.blocks.0.norm1.weight"]
    tensors["backbone.output_layer.linear.bias"] = torch.zeros(14)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TokenDriftError) as caught:
        load_denoiser(tmp_path)
    for part in (
        "missing blocks.0.norm1.weight (16,)",
        "unexpected stray (3,)",
        "output_layer.linear.bias has (14,), expected (13,)",
        "Check hidden_dim",
    ):
        assert part in str(caught.value)


def test_a_folder_without_a_model_and_an_unknown_type_are_named(tmp_path, model):
    with pytest.raises(TokenDriftError, match=r"has no config\.json"):
        load_denoiser(tmp_path)
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "bert"}))
    with pytest.raises(TokenDriftError, match="model_type mdlm or DUO"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize("kind", ["mdlm", "duo"])
def test_a_folder_in_the_hub_layout_gives_the_logits_of_the_official_backbone(tmp_path, golden, kind):
    fixture = golden(f"dit_{kind}")
    stored = fixture.data
    weights = {
        "backbone." + name.removeprefix("state_dict."): tensor.contiguous()
        for name, tensor in stored.items()
        if name.startswith("state_dict.")
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fixture.params["config"]))
    model, process = load_denoiser(tmp_path)
    assert process.mask_id == (22 if kind == "mdlm" else None)
    logits = model(stored["input_ids"], stored["sigma"])
    fixture.assert_matches(logits, "no_time.logits" if kind == "mdlm" else "ids.logits")
