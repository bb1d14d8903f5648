"""Checkpoints: what is saved comes back, what is released loads, and what does not fit is named."""

import copy
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from tokendrift import TokenDriftError
from tokendrift.diffusion import Cosine, Geometric, MaskedDiffusion, UniformDiffusion
from tokendrift.models import DiT, DiTConfig, load_denoiser, read_checkpoint, save_denoiser
from tokendrift.models.weight_files import FORMATS, WeightFile


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DiT(DiTConfig(vocab_size=13, model_length=8, hidden_dim=16, cond_dim=4, n_blocks=2, n_heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # the zero-initialised layers too
    return model.eval()


@pytest.fixture(params=["mdlm", "duo"])
def official(request, golden):
    """Golden weights under the names of the hub: fixture, tensors, key of the golden logits."""
    numbers = golden(f"dit_{request.param}")
    weights = {
        "backbone." + name.removeprefix("state_dict."): tensor.contiguous()
        for name, tensor in numbers.data.items()
        if name.startswith("state_dict.")
    }
    return numbers, weights, "no_time.logits" if request.param == "mdlm" else "ids.logits"


def write_hub_layout(folder, numbers, weights):
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(numbers.params["config"]))
    return folder


# ------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("process", [MaskedDiffusion(13, 4), UniformDiffusion(13)], ids=["masked", "uniform"])
def test_a_saved_model_loads_to_the_same_function_and_process(tmp_path, model, process):
    save_denoiser(model, tmp_path / "model", process)
    loaded, found = load_denoiser(tmp_path / "model")
    ids = torch.arange(8)[None] % 13
    torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=0)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert type(found) is type(process) and found.mask_id == process.mask_id and found.vocab_size == 13
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1, "who may read the configuration may read the weights"


@pytest.mark.parametrize("mask_id", [4, None])
def test_the_default_process_is_that_of_the_mask_id(tmp_path, mask_id):
    model = DiT(DiTConfig(13, 8, 16, 4, 1, 2, mask_id=mask_id))
    save_denoiser(model, tmp_path / "model", dtype=torch.float16)
    loaded, _ = load_denoiser(tmp_path / "model", dtype=torch.float64)
    assert loaded.config == model.config and loaded.mask_id == mask_id
    assert loaded.vocab_embed.embedding.dtype == torch.float64
    assert type(load_denoiser(tmp_path / "model")[1]) is (UniformDiffusion if mask_id is None else MaskedDiffusion)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path, model):
    partly = copy.deepcopy(model)
    partly.blocks[0] = torch.compile(partly.blocks[0], backend="eager")
    for index, compiled in enumerate((torch.compile(model, backend="eager"), partly)):
        save_denoiser(compiled, tmp_path / str(index), UniformDiffusion(13))
        loaded = load_denoiser(tmp_path / str(index))[0].state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    torch.save(compiled.state_dict(), tmp_path / "weights.pt")
    assert load_denoiser(tmp_path / "weights.pt", config={"model_type": "DUO"})[0].config.n_blocks == 2


@pytest.mark.parametrize("schedule", [Cosine(power=2), Geometric(sigma_max=5.0)])
def test_the_schedule_comes_back(tmp_path, model, schedule):
    save_denoiser(model, tmp_path, UniformDiffusion(13, schedule))
    assert load_denoiser(tmp_path)[1].schedule == schedule


def test_half_precision_on_disk_comes_back_as_float32_with_exact_positions(tmp_path, model):
    save_denoiser(model, tmp_path, UniformDiffusion(13), dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["backbone.vocab_embed.embedding"].dtype == torch.float16
    stored["backbone.rotary_emb.inv_freq"] = stored["backbone.rotary_emb.inv_freq"].half()  # as others may store it
    save_file(stored, tmp_path / "model.safetensors")
    loaded = load_denoiser(tmp_path)[0]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.rotary_emb.inv_freq, model.rotary_emb.inv_freq)


def test_dtype_and_device_are_those_asked_for(tmp_path, model):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    loaded = load_denoiser(tmp_path, dtype=torch.bfloat16, device=torch.device("cpu"))[0]
    assert {(parameter.dtype, parameter.device.type) for parameter in loaded.parameters()} == {(torch.bfloat16, "cpu")}
    assert loaded.rotary_emb.inv_freq.dtype == torch.float32


def test_loading_leaves_the_random_state_alone(tmp_path, model):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    state = torch.get_rng_state()
    load_denoiser(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_writing_over_a_loaded_checkpoint_changes_no_loaded_weight(tmp_path, model):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    loaded = load_denoiser(tmp_path)[0]
    before = loaded.vocab_embed.embedding.detach().clone()
    with torch.no_grad():
        model.vocab_embed.embedding.zero_()
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    assert torch.equal(loaded.vocab_embed.embedding, before)
    assert not load_denoiser(tmp_path)[0].vocab_embed.embedding.any()


def test_a_state_that_is_not_whole_is_refused_before_anything_is_written(tmp_path, model):
    state = dict(list(model.state_dict().items())[1:])
    with pytest.raises(TokenDriftError, match="state lacks 1 weights"):
        save_denoiser(model, tmp_path / "model", state=state)
    assert not (tmp_path / "model").exists()


def test_an_interrupted_first_save_leaves_nothing(tmp_path, model, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_denoiser(model, tmp_path / "model", UniformDiffusion(13))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_second_save_leaves_no_mixture(tmp_path, model, monkeypatch):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    replace = Path.replace

    def interrupted(self, target):
        if target.name == "config.json":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_denoiser(model, tmp_path, MaskedDiffusion(13))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(TokenDriftError, match=r"has no config\.json"):
        load_denoiser(tmp_path)


def test_saving_beside_other_files_keeps_them(tmp_path, model):
    (tmp_path / "records.json").write_text("[]")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "records.json"]


# -------------------------------------------------------------------------------------- released layouts


def test_a_folder_in_the_hub_layout_gives_the_logits_of_the_official_backbone(tmp_path, official):
    numbers, weights, key = official
    model, process = load_denoiser(write_hub_layout(tmp_path, numbers, weights))
    assert process.mask_id == model.mask_id == (22 if key.startswith("no_time") else None)
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), key)


def test_shards_and_their_index_load_like_one_file(tmp_path, official):
    numbers, weights, key = official
    write_hub_layout(tmp_path, numbers, weights)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    numbers.assert_matches(load_denoiser(tmp_path)[0](numbers["input_ids"], numbers["sigma"]), key)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TokenDriftError, match=r"shards that do not exist: model-00002-of-00002\.safetensors"):
        load_denoiser(tmp_path)


def test_a_bare_weight_file_shows_its_own_sizes(tmp_path, official):
    numbers, weights, key = official
    save_file(weights, tmp_path / "weights.safetensors")
    kind = numbers.params["config"]["model_type"]
    model, _ = load_denoiser(tmp_path / "weights.safetensors", config={"model_type": kind})
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), key)
    wanted = numbers.params["config"] | {"model_length": 1024}
    for name in ("vocab_size", "hidden_dim", "cond_dim", "n_blocks", "n_heads", "model_length", "time_conditioning"):
        assert getattr(model.config, name) == wanted[name]


def test_fields_that_config_json_leaves_out_come_from_the_weights(tmp_path, official):
    numbers, weights, key = official
    write_hub_layout(tmp_path, numbers, weights)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": numbers.params["config"]["model_type"]}))
    numbers.assert_matches(load_denoiser(tmp_path)[0](numbers["input_ids"], numbers["sigma"]), key)


def test_the_constant_of_the_positions_may_be_absent_if_heads_are_known(tmp_path, official):
    numbers, weights, key = official
    del weights["backbone.rotary_emb.inv_freq"]
    write_hub_layout(tmp_path, numbers, weights)
    numbers.assert_matches(load_denoiser(tmp_path)[0](numbers["input_ids"], numbers["sigma"]), key)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": numbers.params["config"]["model_type"]}))
    with pytest.raises(TokenDriftError, match=r"n_heads cannot be read from weights[\s\S]*config=\{'n_heads': ...\}"):
        load_denoiser(tmp_path)
    numbers.assert_matches(
        load_denoiser(tmp_path, config={"n_heads": 4})[0](numbers["input_ids"], numbers["sigma"]), key
    )


def test_pickled_weights_of_plain_tensors_load(tmp_path, official):
    numbers, weights, key = official
    write_hub_layout(tmp_path, numbers, weights)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    numbers.assert_matches(load_denoiser(tmp_path)[0](numbers["input_ids"], numbers["sigma"]), key)


def test_the_bert_vocabulary_has_its_mask_at_103(tmp_path):
    save_denoiser(DiT(DiTConfig(30522, 8, 4, 4, 1, 1)), tmp_path, MaskedDiffusion(30522))
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"mask_id": None}))
    assert load_denoiser(tmp_path)[1].mask_id == 103
    assert load_denoiser(tmp_path, config={"mask_id": 7})[1].mask_id == 7


# --------------------------------------------------------------------------------------------------- hub


def test_a_hub_id_fetches_data_files_only_and_names_the_commit(tmp_path, official, monkeypatch):
    numbers, weights, key = official
    snapshot = write_hub_layout(tmp_path / "0123abcd", numbers, weights)
    asked = {}

    def fetch(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    checkpoint = read_checkpoint("s-sahoo/duo", revision="main")
    assert asked == {"repo_id": "s-sahoo/duo", "revision": "main", "allow_patterns": ["*.safetensors", "*.json"]}
    assert checkpoint.revision == "0123abcd"
    model, _ = load_denoiser("s-sahoo/duo")
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), key)


SDTT = {
    "parameterization": {"name": "multi-round-sdtt", "num_distill_steps": 2, "checkpoint_path": "${cwd:}/a.ckpt"},
    "time_conditioning": False,
    "noise": {"type": "loglinear"},
    "tokenizer": {"name": "gpt2"},
    "trainer": {"max_steps": 80_000},
}


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.backbone."])
def test_students_of_sdtt_load_from_their_revisions(tmp_path, golden, monkeypatch, prefix):
    """Their ``config.json`` is the Hydra configuration of the run; the hub's class within it has the prefix twice."""
    numbers = golden("dit_mdlm")
    sizes, names = numbers.params["config"], {"hidden_size": "hidden_dim", "length": "model_length"}
    same = ("cond_dim", "n_blocks", "n_heads", "dropout")
    sizes = {"name": "small", "type": "ddit-orig"} | {
        own: sizes[theirs] for own, theirs in (names | dict(zip(same, same, strict=True))).items() if theirs in sizes
    }
    weights = {
        prefix + name.removeprefix("state_dict."): tensor.contiguous()
        for name, tensor in numbers.data.items()
        if name.startswith("state_dict.")
    }
    snapshot = tmp_path / "4567cdef"
    snapshot.mkdir()
    save_file(weights, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps(SDTT | {"model": sizes}))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(snapshot)
    )
    model, process = load_denoiser("jdeschena/sdtt", revision="baselines_kld_step_70000")
    assert asked[0][0] == "jdeschena/sdtt" and asked[0][1]["revision"] == "baselines_kld_step_70000"
    assert isinstance(process, MaskedDiffusion) and process.mask_id == 22
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), "no_time.logits")
    other = sizes | {"type": "ar_orig"}
    (snapshot / "config.json").write_text(json.dumps(SDTT | {"model": other}))
    with pytest.raises(TokenDriftError, match="'ar_orig' network trained as 'multi-round-sdtt'"):
        load_denoiser(snapshot)


@pytest.mark.parametrize("name", ["kekchpek/idlm-mdlm", "kekchpek/idlm-duo", "s-sahoo/duo-distilled"])
def test_students_in_the_layout_of_duo_load(tmp_path, golden, monkeypatch, name):
    """A folder as transformers writes it, with the fields of its remote class."""
    kind = "mdlm" if name.endswith("mdlm") else "duo"
    numbers = golden(f"dit_{kind}")
    weights = {
        "backbone." + key.removeprefix("state_dict."): tensor.contiguous()
        for key, tensor in numbers.data.items()
        if key.startswith("state_dict.")
    }
    write_hub_layout(tmp_path, numbers, weights)
    remote = {"architectures": ["DUO"], "auto_map": {"AutoConfig": "config.DUOConfig"}, "causal": False}
    remote |= {"return_dict": False, "torch_dtype": "float32", "transformers_version": "4.48.0"}
    (tmp_path / "config.json").write_text(json.dumps(remote | numbers.params["config"]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    model, process = load_denoiser(name)
    assert process.mask_id == (22 if kind == "mdlm" else None)
    key = "no_time.logits" if kind == "mdlm" else "ids.logits"
    numbers.assert_matches(model(numbers["input_ids"], numbers["sigma"]), key)


def test_without_a_network_the_message_says_how_to_go_on(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(TokenDriftError) as caught:
        load_denoiser("kuleshov-group/mdlm-owt", revision="v9")
    for part in (
        "'kuleshov-group/mdlm-owt' is not a local path, and cannot be downloaded from the hub at revision v9: Cannot",
        "copy config.json and model.safetensors",
    ):
        assert part in str(caught.value)


# ------------------------------------------------------------------------------------------------ errors


def test_missing_extra_and_misshapen_tensors_are_all_listed(tmp_path, model):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.stray"] = torch.zeros(3)
    del tensors["backbone.blocks.0.norm1.weight"]
    tensors["backbone.output_layer.linear.bias"] = torch.zeros(14)
    tensors["backbone.rotary_emb.inv_freq"] *= 3
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TokenDriftError) as caught:
        load_denoiser(tmp_path)
    for part in (
        "missing blocks.0.norm1.weight (16,)",
        "unexpected stray (3,)",
        "output_layer.linear.bias has (14,), expected (13,)",
        "rotary_emb.inv_freq is not that of base 10000",
        "Check hidden_dim",
    ):
        assert part in str(caught.value)


def test_a_wrong_number_of_heads_is_noticed(tmp_path, model):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    with pytest.raises(TokenDriftError, match=r"rotary_emb\.inv_freq has \(4,\), expected \(2,\)"):
        load_denoiser(tmp_path, config={"n_heads": 4})


def test_a_folder_without_a_model_and_an_unknown_type_are_named(tmp_path, model):
    with pytest.raises(TokenDriftError, match=r"has no config\.json"):
        load_denoiser(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenDriftError, match=r"has no model\.safetensors"):
        load_denoiser(tmp_path)
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    for wrong in ("bert", None):
        with pytest.raises(TokenDriftError, match=r"model_type mdlm or DUO[\s\S]*State it in config.json or pass"):
            load_denoiser(tmp_path, config={"model_type": wrong})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 1, "vocab_size": 13},
            "lacks weights of BertForMaskedLM",
        ),
        ({"model_type": "gpt2", "transformers_version": "5"}, r"not known as a masked[\s\S]*MaskedLMDenoiser\(model"),
        ({"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}, "model_type": "mdlm"}, "score network of SEDD"),
        ({"model_type": "bd3lm"}, r"Block diffusion \(BD3-LM\) is not supported"),
    ],
)
def test_the_error_for_a_folder_of_others_leads_the_right_way(backbone, tmp_path, config, message):
    save_denoiser(backbone(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TokenDriftError, match=message):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, r"nowhere does not exist\.[\s\S]*hub id owner/name"),
        ("a/b/c", {}, r"does not exist"),
        (".", {"revision": "main"}, r"revision belongs to hub ids"),
        ("model", {"device": "abacus"}, r"device 'abacus' cannot be used: [\s\S]*Pass a device of this machine"),
        ("model", {"config": {"heads": 3}}, r"config has unknown fields: heads\.[\s\S]*n_heads"),
        ("model", {"config": {"causal": True}}, r"unknown fields: causal"),
        ("model", {"config": {"schedule": {"name": "Sine"}}}, r"schedule in config.json must be one of LogLinear"),
        ("model", {"config": {"schedule": "Sine"}}, r"schedule in config.json must be one of LogLinear"),
        ("model", {"config": {"schedule": {"name": "Cosine", "k": 2}}}, r"schedule in config.json does not fit Cosine"),
        ("model", {"dtype": "bfloat16"}, r"dtype must be a floating torch.dtype"),
        ("model", {"dtype": torch.int64}, r"dtype must be a floating torch.dtype"),
        ("text.txt", {}, r"is not a weight file; its name must end with one of \.safetensors, \.ckpt"),
        ("broken.safetensors", {}, r"broken\.safetensors cannot be read"),
        ("broken.ckpt", {}, r"broken\.ckpt is not loaded"),
    ],
)
def test_bad_sources_are_refused(tmp_path, model, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    save_denoiser(model, "model", UniformDiffusion(13))
    for name in ("text.txt", "broken.safetensors", "broken.ckpt"):
        Path(name).write_text("no weights")
    with pytest.raises(TokenDriftError, match=message):
        load_denoiser(source, **options)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_shards_is_named(tmp_path, model, index):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(TokenDriftError, match=r"index\.json does not list any shards"):
        load_denoiser(tmp_path)


def test_an_index_cannot_reach_outside_its_folder(tmp_path, official):
    numbers, weights, _ = official
    folder = write_hub_layout(tmp_path / "model", numbers, weights)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    placed = dict.fromkeys(weights, "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(TokenDriftError, match=r"shards that do not exist: outside\.safetensors"):
        load_denoiser(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_configuration_is_named(tmp_path, model, text):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TokenDriftError, match=r"config\.json (is not readable JSON|must hold a JSON object)"):
        load_denoiser(tmp_path)


def test_a_causal_network_is_refused(tmp_path, model):
    save_denoiser(model, tmp_path, UniformDiffusion(13))
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"causal": True}))
    with pytest.raises(TokenDriftError, match="causal networks"):
        load_denoiser(tmp_path)


def test_a_process_that_does_not_belong_to_the_network_is_not_written(tmp_path, model):
    with pytest.raises(TokenDriftError, match="process has vocab_size 14, but the network has 13"):
        save_denoiser(model, tmp_path / "model", UniformDiffusion(14))
    masked = DiT(DiTConfig(13, 8, 16, 4, 1, 2, mask_id=4))
    with pytest.raises(TokenDriftError, match="process has mask_id None, but the network has 4"):
        save_denoiser(masked, tmp_path / "model", UniformDiffusion(13))
    assert not (tmp_path / "model").exists()


def test_a_wrapped_network_is_not_written(tmp_path, model):
    wrapped = torch.nn.Sequential(model)
    with pytest.raises(TokenDriftError, match=r"model must be a DiT[\s\S]*model\.module"):
        save_denoiser(wrapped, tmp_path, UniformDiffusion(13))


def test_a_schedule_of_ones_own_is_not_written(tmp_path, model):
    class Sine:
        def alpha(self, t):
            return 1 - torch.sin(t)

    with pytest.raises(TokenDriftError, match=r"schedule of type Sine cannot be written to config\.json"):
        save_denoiser(model, tmp_path / "model", UniformDiffusion(13, Sine()))


def test_a_format_of_ones_own_is_one_line_in_the_table(tmp_path, model, monkeypatch):
    torch.save(model.state_dict(), tmp_path / "weights.mine")

    def read(path, ema):
        return WeightFile(torch.load(path), "mine", {"model_type": "DUO", "n_heads": model.config.n_heads})

    monkeypatch.setitem(FORMATS, ".mine", read)
    checkpoint = read_checkpoint(tmp_path / "weights.mine")
    assert checkpoint.weights == "mine" and checkpoint.config["model_type"] == "DUO"
    loaded, _ = load_denoiser(tmp_path / "weights.mine")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_file_cannot_permit_its_own_code(model, tmp_path):
    save_denoiser(model, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trust_remote_code": True}))
    assert not read_checkpoint(tmp_path).trusted
    assert read_checkpoint(tmp_path, config={"trust_remote_code": True}).trusted
    for text in ("False", "no"):  # what the command line passes for words that JSON does not know
        with pytest.raises(TokenDriftError, match="trust_remote_code must be true or false"):
            read_checkpoint(tmp_path, config={"trust_remote_code": text})


def test_a_schedule_that_cannot_be_built_is_named(model, tmp_path):
    save_denoiser(model, tmp_path)
    with pytest.raises(TokenDriftError, match=r"schedule in config.json does not fit Linear: could not convert"):
        load_denoiser(tmp_path, config={"schedule": {"name": "Linear", "sigma_max": "a"}})
