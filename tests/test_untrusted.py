"""Readers of files of unknown origin: whatever a file holds, it is read, or one error names the file."""

from __future__ import annotations

import copy
import gzip
import json
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tokendrift import TokenDriftError
from tokendrift.evaluation import read_samples
from tokendrift.models import DiT, DiTConfig, load_denoiser, save_denoiser
from tokendrift.models.tokenizer import decode, encode, load_tokenizer
from tokendrift.text_files import TextFiles
from tokendrift.training.config import all_setting_types, make_config, parse_settings

OUTCOMES = Counter()
TIMES = pytest.mark.parametrize("times", [25, pytest.param(2000, marks=pytest.mark.slow)])

numbers = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([0, -1, 10**7, 2**31, 2**63, 10**30, 10**400, -(10**400)]),
    st.floats(),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(["3", "false", "none", "nan"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


def drive(times, strategy, use):
    """Call a function on many examples of a strategy."""
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=times, derandomize=times < 100, **options)(given(strategy)(use))()


def attempt(reader, use, named=""):
    """Use a reader, which may raise the error of this package and no other."""
    try:
        use()
    except TokenDriftError as error:
        said = str(error)
        assert named in said and said.strip() and "Traceback" not in said
        OUTCOMES[reader, "refused"] += 1
    else:
        OUTCOMES[reader, "read"] += 1


# ------------------------------------------------------------------------------------------- configuration


@TIMES
def test_settings_of_any_value(times):
    names = st.sampled_from([*all_setting_types(), "preset", "temperature"])

    def use(given):
        attempt("configuration", lambda: make_config(values={"checkpoint": "a", **given}))

    drive(times, st.dictionaries(names, values, min_size=1, max_size=3), use)


@TIMES
def test_settings_as_text(times):
    names = st.sampled_from([*all_setting_types()])

    def use(given):
        attempt("configuration", lambda: make_config(values={"checkpoint": "a", **parse_settings([given])}))

    texts = st.one_of(st.text(max_size=8), numbers.map(lambda n: f"{n:.0f}" if abs(n) < 1e300 else "nan"))
    drive(times, st.builds("{}={}".format, names, texts), use)


@TIMES
def test_toml_of_any_content(times, tmp_path):
    file = tmp_path / "run.toml"
    whole = make_config(values={"checkpoint": "a"}).as_toml().encode()

    def use(content):
        file.write_bytes(content)
        attempt("configuration", lambda: make_config(file=file))

    drive(times, damaged(whole), use)


@pytest.mark.parametrize(
    "content",
    ["a = " + "[" * 100_000, "steps = " + "9" * 5000, "checkpoint = 'a'\nweight_decay = nan", "\x00", "a.b.c = 1"],
)
def test_toml_that_parsers_choke_on(tmp_path, content):
    file = tmp_path / "run.toml"
    file.write_text(content)
    with pytest.raises(TokenDriftError):
        make_config(file=file)


@pytest.mark.parametrize("name", ["weight_decay", "learning_rate", "clip", "ema", "dropout", "checkpoint_minutes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, True, "1", 10**400])
def test_rates_are_finite_numbers(name, value):
    with pytest.raises(TokenDriftError, match=name):
        make_config(values={"checkpoint": "a", name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"temperatures": [float("nan")]}, "temperatures .tau. must be a finite number above 0"),
        ({"drift_scale": float("inf")}, "drift_scale .* must be a finite number"),
        ({"objective": "mirror-kl", "mirror_step": float("nan")}, "mirror_step .* must be a finite number"),
        ({"chains": [10**9]}, "chains must be at most 10,000"),
        ({"length": 10**8}, "length must be at most 1,000,000"),
        ({"seed": 2**64}, "seed must be at most"),
    ],
)
def test_absurd_settings_are_refused_before_the_work_begins(change, said):
    with pytest.raises(TokenDriftError, match=said):
        make_config(values={"checkpoint": "a", **change})


# ------------------------------------------------------------------------------------------- checkpoints


def damaged(whole):
    """Return bytes that begin like a file, with parts cut, exchanged or replaced; or any bytes."""

    def change(at, length, fresh):
        first = at % (len(whole) + 1)
        return whole[:first] + fresh + whole[first + length :]

    small = st.integers(0, 40)
    places = st.one_of(small, st.integers(0, 10**6))
    return st.one_of(st.binary(max_size=60), st.builds(change, places, st.one_of(small, places), st.binary(max_size=8)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_denoiser(DiT(DiTConfig(7, 4, hidden_dim=8, cond_dim=4, n_blocks=1, n_heads=2, mask_id=6)), folder)
    return folder


@TIMES
def test_a_configuration_of_any_value_beside_weights(times, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())

    def use(change):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        attempt("checkpoint", lambda: load_denoiser(tmp_path))

    names = st.sampled_from([*config, "schedule", "random_input", "causal", "architectures", "graph"])
    drive(times, st.dictionaries(names, values, min_size=1, max_size=2), use)


@TIMES
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.ckpt", "model.safetensors.index.json"])
def test_a_checkpoint_of_any_bytes(times, checkpoint, tmp_path, name):
    tensors = load_file(checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    if name != "model.safetensors.index.json":
        save_file(tensors, tmp_path / "model.safetensors")
    file = tmp_path / name
    if name == "model.ckpt":
        torch.save({"state_dict": tensors}, file)
    elif name == "model.safetensors.index.json":
        file.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    whole = file.read_bytes()

    def use(content):
        file.write_bytes(content)
        attempt("checkpoint", lambda: load_denoiser(file if name == "model.ckpt" else tmp_path))

    drive(times, damaged(whole), use)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_blocks": 10**9}, "n_blocks must be at most"),
        ({"n_blocks": 10**7}, r"n_blocks is 10000000, but there are tensors of 1 blocks; missing is blocks\.1"),
        ({"n_blocks": "1"}, "n_blocks must be an integer"),
        ({"hidden_dim": True}, "hidden_dim must be an integer"),
        ({"time_conditioning": "false"}, "time_conditioning must be true or false"),
        ({"dropout": float("nan")}, r"dropout must lie in \[0, 1\]"),
        ({"dropout": "0.1"}, r"dropout must lie in \[0, 1\]"),
        ({"mask_id": "6"}, "mask_id must be an integer"),
        ({"mask_id": True}, "mask_id must be an integer"),
        ({"schedule": {"name": ["LogLinear"]}}, "schedule in config.json must be one of"),
    ],
)
def test_fields_of_other_types_and_sizes_that_the_weights_deny_are_refused(checkpoint, tmp_path, change, said):
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(TokenDriftError, match=said):
        load_denoiser(tmp_path)


def test_deep_json_and_quantised_weights_are_refused(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "backbone.blocks.0.attn_out.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(
        TokenDriftError, match=r"blocks.0.attn_out.weight is torch.int8 .* expected dense floating point"
    ):
        load_denoiser(tmp_path)
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(TokenDriftError, match=r"config.json is not readable JSON"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {0: torch.zeros(1)},
        {"state_dict": {0: torch.zeros(1)}},
        {"state_dict": {"backbone.a": torch.zeros(1)}, "ema": {"shadow_params": 3}},
        {"state_dict": {"backbone.a": torch.zeros(1)}, "ema": {"shadow_params": [3]}},
        {"state_dict": {"backbone.a": torch.zeros(1)}, "hyper_parameters": {"config": {"algo": {"name": ["mdlm"]}}}},
    ],
)
def test_pickles_of_other_content_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(TokenDriftError):
        load_denoiser(tmp_path / "a.ckpt", config={"model_type": "mdlm", "n_heads": 1})


# ------------------------------------------------------------------------------------------- samples, text, tokenizers

entries = st.one_of(
    values,
    st.fixed_dictionaries({}, optional={"ids": values | st.lists(numbers, max_size=3), "text": values, "nfe": values}),
    st.builds(lambda header: {"tokendrift": header}, values | st.fixed_dictionaries({"n": values, "complete": values})),
)


def lines_of(entries):
    return "\n".join(map(json.dumps, entries)).encode()


@TIMES
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
def test_samples_and_text_of_any_content(times, tmp_path, name):
    file = tmp_path / name
    pack = gzip.compress if name.endswith(".gz") else bytes

    def use(content):
        file.write_bytes(content)
        attempt("samples", lambda: read_samples(file), str(file))
        attempt("samples", lambda: read_samples(file, skip_bad=True, lines=True, skip_blank=True), str(file))
        for documents in ("file", "paragraph", "line"):
            attempt("text", lambda documents=documents: list(TextFiles([file], documents=documents).read()), str(file))

    good = pack(lines_of([{"tokendrift": {"n": 1, "complete": True}}, {"ids": [1], "text": "a", "nfe": 2}]))
    drive(times, st.one_of(st.lists(entries, max_size=4).map(lines_of).map(pack), damaged(good), st.binary()), use)


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<eos>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    ],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"<eos>": 0, "a": 1, "b": 2}, "unk_token": "<eos>"},
}  # fmt: skip


@TIMES
def test_a_tokenizer_of_any_content(times, tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "tokenizer.json"

    def use(change):
        path, value = change
        content = copy.deepcopy(TOKENIZER)
        *above, last = path
        part = content
        for key in above:
            part = part[key]
        part[last] = value
        file.write_text(json.dumps(content))

        def read():
            tokenizer = load_tokenizer(file)
            decode(tokenizer, [*encode(tokenizer, ["a b c", ""]), [0, 1, 5, 2**31]])

        attempt("tokenizer", read)

    paths = st.sampled_from(
        [
            ("model",), ("model", "vocab"), ("model", "type"), ("model", "unk_token"), ("model", "vocab", "a"),
            ("pre_tokenizer",), ("added_tokens",), ("added_tokens", 0, "id"), ("normalizer",), ("decoder",),
            ("truncation",), ("padding",), ("post_processor",),
        ]
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        drive(times, st.tuples(paths, values | st.dictionaries(st.text(max_size=3), numbers, max_size=3)), use)


def test_a_tokenizer_that_fails_at_its_work_is_one_error(tmp_path):
    pytest.importorskip("transformers")
    model = {**TOKENIZER["model"], "unk_token": "<none>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "model": model}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert encode(tokenizer, ["a b"]) == [[1, 2]]
    with pytest.raises(TokenDriftError, match="the tokenizer fails: "):
        encode(tokenizer, ["c"])
