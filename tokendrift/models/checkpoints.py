"""Checkpoints in the layout of the released models: ``config.json`` beside ``model.safetensors``.

Tensors carry the prefix ``backbone.``, as those of `kuleshov-group/mdlm-owt` and `s-sahoo/duo` do. Masked language
models of transformers have their own layout, see `tokendrift.models.pretrained`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tokendrift import diffusion
from tokendrift._checks import check_device, check_flag, fail
from tokendrift.diffusion import MaskedDiffusion, Process, UniformDiffusion
from tokendrift.models import hub, lightning, pretrained
from tokendrift.models.adapters import MaskedLMConfig, MaskedLMDenoiser
from tokendrift.models.dit import DiT, DiTConfig
from tokendrift.models.layers import rotary_frequencies
from tokendrift.models.tokenizer import has_tokenizer
from tokendrift.models.weight_files import CONFIG, INDEX, WEIGHTS, read_weights

LoadedDenoiser: TypeAlias = DiT | MaskedLMDenoiser
Model = TypeVar("Model", bound=nn.Module)

SCHEDULES = ("LogLinear", "Cosine", "DuoCosine", "Linear", "Geometric")
HEADS = (CONFIG, pretrained.ADAPTERS)  # the files without which a folder cannot be loaded
SIZES = tuple(field.name for field in dataclasses.fields(DiTConfig))
# What the remote classes of the hub assume where config.json is silent.
DEFAULTS = {"vocab_size": 50258, "model_length": 1024, "hidden_dim": 768, "cond_dim": 129, "n_blocks": 12}


class Checkpoint(NamedTuple):
    """The content of a checkpoint, before a network is built from it.

    Attributes:
        source: Folder or file that the weights came from.
        config: Fields of ``config.json``, or what a Lightning checkpoint says under the same names.
        tensors: Weights by the parameter names of `DiT`.
        weights: What the weights are, such as ``"safetensors"`` or ``"averaged (EMA) weights of step 1000000"``.
        revision: Commit of a hub repository, None for local files.
        base: For a model of transformers the folder of the whole model: for adapters of peft, that of their base model.
            Its weights are read by `build`. None for the layouts of MDLM and DUO.
    """

    source: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: str
    revision: str | None = None
    base: Path | None = None

    @property
    def folder(self) -> Path:
        """Folder in which the tokenizer is looked for."""
        own = self.source if self.source.is_dir() else self.source.parent
        return own if self.base is None or has_tokenizer(own) else self.base

    @property
    def trusted(self) -> bool:
        """Whether the user permits Python code of the checkpoint to be run."""
        return bool(self.config.get("trust_remote_code"))


def load_denoiser(
    source: str | Path,
    *,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    ema: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[LoadedDenoiser, Process]:
    """Load a released, trained or saved denoiser.

    Args:
        source: A hub id such as ``kuleshov-group/mdlm-owt``; a folder with ``config.json`` and
            ``model.safetensors`` (or its shards and their index); a safetensors file; a Lightning ``.ckpt``
            of the MDLM or DUO repository; or the folder or hub id of a masked language model of transformers, or of
            adapters of peft on one.
        revision: Branch, tag or commit of a hub repository.
        config: Fields that replace or complete those of ``config.json``, such as ``{"model_type": "mdlm"}``
            for a bare weight file or ``{"mask_id": 103}``. For a model of transformers these are ``mask_id``,
            ``vocab_size``, ``model_length``, ``shifted`` (as in `MaskedLMDenoiser`), ``schedule``, ``base_model`` (of
            adapters) and ``trust_remote_code``, without which no code that a checkpoint brings is run.
        ema: Whether to take the averaged weights of a Lightning checkpoint if it has them, as its authors do.
        dtype: Dtype of the parameters. Default: float32, whatever the file holds.
        device: Device of the parameters. Default: the CPU.

    Returns:
        The network in evaluation mode and its process: a `DiT`, or a `MaskedLMDenoiser` for a model of transformers.

    Raises:
        TokenDriftError: If something cannot be found or read, the model type is unknown, a model of transformers needs
            code that is not trusted, or tensors are missing, left over or of the wrong shape; all of them are listed.
    """
    checkpoint = read_checkpoint(source, revision=revision, config=config, ema=ema)
    return build(checkpoint, dtype=dtype, device=device)


def read_checkpoint(
    source: str | Path, *, revision: str | None = None, config: Mapping[str, Any] | None = None, ema: bool = True
) -> Checkpoint:
    """Read configuration and weights without building a network; arguments as in `load_denoiser`."""
    hub.check_local(source, "checkpoint")
    path = Path(source)
    commit = None
    if not path.exists() and hub.is_hub_id(str(source)):
        path = hub.download(str(source), revision)
        commit = path.name  # the cache names a snapshot by its commit
    elif not path.exists():
        raise fail(f"{source} does not exist.", "Pass a folder, a file, or a hub id owner/name.")
    elif revision is not None:
        raise fail(f"revision belongs to hub ids, and {source} is a local path.", "Leave it out.", revision=revision)
    given = dict(config or {})
    check_flag("trust_remote_code", given.get("trust_remote_code", False))
    stated = pretrained.stated_config(path, given)
    if stated is not None:
        if commit is not None:
            path = hub.download(str(source), revision, pretrained.further_files(given))
        base = pretrained.base_folder(path, stated)
        label = "model of transformers" if base == path else f"adapters of peft for {base}"
        return Checkpoint(path, stated, {}, label, commit, base)
    found = read_weights(path, ema=ema)
    unknown = set(given) - {*SIZES, "model_type", "schedule", "trust_remote_code"}
    if unknown:
        raise fail(f"config has unknown fields: {', '.join(sorted(unknown))}.", f"The fields are {', '.join(SIZES)}.")
    # A hub class within the module of a training run has the prefix twice.
    tensors = {_plain_name(name).replace(lightning.PREFIX, ""): tensor for name, tensor in found.tensors.items()}
    stated = found.config | {"trust_remote_code": False} | given  # only the user permits code, never the file
    return Checkpoint(path, stated, tensors, found.label, commit)


def build(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[LoadedDenoiser, Process]:
    """Build the network and the process of a checkpoint; arguments and errors as in `load_denoiser`."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise fail("dtype must be a floating torch.dtype, such as torch.bfloat16.", dtype=dtype)
    device = check_device(device or "cpu")
    if checkpoint.base is not None:
        folder, stated = checkpoint.folder, checkpoint.config
        denoiser = pretrained.load_masked_lm(checkpoint.source, checkpoint.base, stated, folder)
        process = MaskedDiffusion(denoiser.vocab_size, denoiser.mask_id, _make_schedule(stated.get("schedule")))
        return denoiser.to(device, dtype or torch.float32), process
    config = complete_config(checkpoint)
    tensors = dict(checkpoint.tensors)
    _check_sizes(config, tensors)
    # 1. An empty network of the stated sizes, and the tensors that it must have.
    with torch.device("meta"):  # no random initial values: quicker, and the caller's random state stays
        model = DiT(config).to(dtype=dtype or torch.float32)
    _check_fit(model, tensors)
    # 2. The rotary constant is computed where the file does not have it in full precision.
    exact, stored = rotary_frequencies(config.hidden_dim // config.n_heads), tensors.get(lightning.BUFFER)
    if stored is None or stored.dtype.itemsize < 4:
        tensors[lightning.BUFFER] = exact  # a constant: half precision on disk must not shift positions
    model.to_empty(device=device)
    model.load_state_dict(tensors)
    return model.eval(), process_of(config, _make_schedule(checkpoint.config.get("schedule")))


def complete_config(checkpoint: Checkpoint) -> DiTConfig:
    """Return all sizes: those stated, else those read off the weights, else the defaults of the hub's classes.

    Raises:
        TokenDriftError: If the model type is missing or unknown, or the number of heads cannot be determined.
    """
    stated = {name: value for name, value in checkpoint.config.items() if value is not None}
    kind = str(stated.get("model_type")).lower()
    if "graph" in stated and "noise" in stated:
        raise fail(
            f"{checkpoint.source} holds a score network of SEDD, whose output is no distribution of clean tokens.",
            "Build it with SEDD's own code and wrap it in tokendrift.diffusion.ScoreDenoiser.",
        )
    if kind not in ("mdlm", "duo"):
        raise fail(
            f"{checkpoint.source} must have model_type mdlm or DUO.",
            _remedy(checkpoint),
            model_type=checkpoint.config.get("model_type"),
        )
    if stated.get("causal"):
        raise fail("causal networks (model 'ar') are not denoisers.", "Load an MDLM or DUO checkpoint.", causal=True)
    sizes = DEFAULTS | _shown(checkpoint.tensors) | {name: stated[name] for name in SIZES if name in stated}
    if "n_heads" not in sizes and sizes["hidden_dim"] == DEFAULTS["hidden_dim"]:
        sizes["n_heads"] = 12
    if "n_heads" not in sizes:
        raise fail("n_heads cannot be read from weights without rotary_emb.inv_freq.", "Pass config={'n_heads': ...}.")
    sizes.setdefault("time_conditioning", kind == "duo")
    if kind == "duo":
        sizes["mask_id"] = None  # a mask entry of the vocabulary is an ordinary state there
    elif sizes.get("mask_id") is None:
        bert = sizes["vocab_size"] == lightning.BERT_VOCABULARY
        sizes["mask_id"] = lightning.BERT_MASK if bert else sizes["vocab_size"] - 1
    return DiTConfig(**sizes)


def _remedy(checkpoint: Checkpoint) -> str:
    """Return what to do with a checkpoint that is neither MDLM's nor DUO's, as far as its configuration tells."""
    stated = checkpoint.config
    if "bd3" in str(stated.get("model_type")).lower():
        return "Block diffusion (BD3-LM) is not supported: its network also reads the blocks before. Load an MDLM."
    if "architectures" in stated or "transformers_version" in stated:
        return "It belongs to a model of transformers: pass the folder of the model instead of the file."
    return "State it in config.json or pass config={'model_type': 'mdlm'}."


def process_of(config: DiTConfig | MaskedLMConfig, schedule: diffusion.Schedule | None = None) -> Process:
    """Return the process that a network is made for: masked where it has a mask entry, else uniform-state."""
    if config.mask_id is None:
        return UniformDiffusion(config.vocab_size, schedule)
    return MaskedDiffusion(config.vocab_size, config.mask_id, schedule)


def save_denoiser(
    model: LoadedDenoiser,
    folder: str | Path,
    process: Process | None = None,
    *,
    dtype: torch.dtype | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as a folder that `load_denoiser` and the hub's layout share.

    A model of transformers inside a `MaskedLMDenoiser` is written as its ``save_pretrained`` does, for its
    ``from_pretrained``: adapters of peft without their base model. The tokenizer is not part of it.

    A new folder is either written completely or not created. In an existing folder, the configuration is removed first
    and written last, so an interruption leaves a folder that cannot be loaded rather than a mixture of two models.

    Args:
        model: The network, compiled or not.
        folder: Made if it does not exist; its other files stay.
        process: Masked (written as model_type ``mdlm``) or uniform (``DUO``); its schedule is kept too. Default: the
            log-linear process that the ``mask_id`` of the model's configuration stands for.
        dtype: Stored dtype; that of the parameters by default.
        state: Weights to write, by the names in ``model.state_dict()``; of adapters, theirs suffice. Default: those of
            the model.

    Raises:
        TokenDriftError: If the model is neither a `DiT` nor around one of transformers, or the process does not belong
            to it or is none of the two, or the state of a `DiT` is not whole.
    """
    from safetensors.torch import save_file

    model = getattr(model, "_orig_mod", model)  # a compiled model
    config, tensors = config_json(model, process), {}
    for name, tensor in (model.state_dict() if state is None else state).items():
        kept = dtype if dtype is not None and tensor.is_floating_point() and name != lightning.BUFFER else tensor.dtype
        tensors[_plain_name(name)] = tensor.detach().to("cpu", kept).contiguous()
    lacking = [name for name in map(_plain_name, dict(model.named_parameters())) if name not in tensors]
    if lacking and not isinstance(model, MaskedLMDenoiser):
        raise fail(f"state lacks {len(lacking)} weights of the model, such as {lacking[0]}.", "Pass all of them.")
    folder = Path(folder)
    # Everything is written beside its place first, on the same file system, so that renaming is atomic.
    beside = folder if folder.is_dir() else folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".saving-") as place:
        made = Path(place) / "model"
        made.mkdir()
        if isinstance(model, MaskedLMDenoiser):
            pretrained.save_masked_lm(model, tensors, made)
            pretrained.write_options(config, made)
        else:
            named = {lightning.PREFIX + name: tensor for name, tensor in tensors.items()}
            save_file(named, made / WEIGHTS, metadata={"format": "pt"})
            (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        files = sorted(made.iterdir(), key=lambda path: path.name in HEADS)
        mode = files[-1].stat().st_mode
        for path in files:
            if path.suffix == ".safetensors":
                path.chmod(mode)  # safetensors writes for the owner alone
        if beside is not folder:
            made.replace(folder)
            return
        for name in (*HEADS, INDEX):  # shards of an earlier model would no longer belong
            (folder / name).unlink(missing_ok=True)
        for path in files:
            path.replace(folder / path.name)


def empty_like(model: Model) -> Model:
    """Return a copy of a model without its weights: the tensors of the copy are on the meta device."""
    empty: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        made = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    return copy.deepcopy(model, empty)


def config_json(model: LoadedDenoiser, process: Process | None) -> dict[str, Any]:
    """Return the content of ``config.json``, or what is written beside that of a model of transformers.

    Arguments and errors are those of `save_denoiser`.
    """
    if not isinstance(getattr(model, "config", None), (DiTConfig, MaskedLMConfig)):
        remedy = "Pass the network inside the wrapper: model.module."
        raise fail("model must be a DiT or a MaskedLMDenoiser.", remedy, model=type(model))
    process = process_of(model.config) if process is None else process
    if not isinstance(process, (MaskedDiffusion, UniformDiffusion)):
        raise fail("process must be MaskedDiffusion or UniformDiffusion to be written.", process=process)
    for name in ("vocab_size", "mask_id"):
        own, other = getattr(model, name), getattr(process, name)
        if own != other and own is not None:
            raise fail(
                f"process has {name} {other}, but the network has {own}.",
                "Save the network with the process that it was trained with.",
            )
    config: dict[str, Any] = dataclasses.asdict(model.config)
    if not isinstance(model, MaskedLMDenoiser):
        config = {"model_type": "mdlm" if isinstance(process, MaskedDiffusion) else "DUO"} | config
        config["mask_id"] = process.mask_id
        if not config["random_input"]:
            del config["random_input"]  # the configuration of a model without one is as it always was
    if process.schedule != diffusion.LogLinear():
        name = type(process.schedule).__name__
        if name not in SCHEDULES or not dataclasses.is_dataclass(process.schedule):
            raise fail(
                f"a schedule of type {name} cannot be written to config.json.",
                f"Save with one of {', '.join(SCHEDULES)}, and pass your own schedule to the process after loading.",
            )
        config["schedule"] = {"name": name} | dataclasses.asdict(process.schedule)
    return config


def checkpoint_fields(pairs: Iterable[str]) -> dict[str, Any]:
    """Return the fields for ``config`` of `load_denoiser` that are written as ``KEY=VALUE``, with values as in JSON.

    Raises:
        TokenDriftError: If one has another form.

    >>> checkpoint_fields(["mask_id=103", "shifted=true", "base_model=bert"])
    {'mask_id': 103, 'shifted': True, 'base_model': 'bert'}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = (part.strip() for part in pair.partition("="))
        if not sign or not name:
            raise fail("checkpoint_config must consist of entries KEY=VALUE, such as mask_id=103.", entry=pair)
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _make_schedule(stated: dict[str, Any] | None) -> diffusion.Schedule | None:
    if stated is None:
        return None
    options = dict(stated) if isinstance(stated, dict) else {"name": stated}
    name = options.pop("name", None)
    if name not in SCHEDULES:
        raise fail(f"schedule in config.json must be one of {', '.join(SCHEDULES)}.", name=name)
    try:
        schedule: diffusion.Schedule = getattr(diffusion, name)(**options)
    except (TypeError, ValueError, OverflowError) as error:
        raise fail(f"schedule in config.json does not fit {name}: {error}.", schedule=stated) from None
    return schedule


def _plain_name(name: str) -> str:
    """Return the name of a parameter without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")


def _shown(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sizes that follow from the shapes of the tensors."""
    shown: dict[str, int] = {}
    embedding, bias, frequencies = (
        tensors.get(name) for name in ("vocab_embed.embedding", "sigma_map.mlp.0.bias", lightning.BUFFER)
    )
    if embedding is not None and embedding.ndim == 2:
        shown |= {"vocab_size": embedding.shape[0], "hidden_dim": embedding.shape[1]}
        if frequencies is not None and frequencies.numel():
            shown["n_heads"] = embedding.shape[1] // (2 * frequencies.numel())
    if bias is not None and bias.ndim == 1:
        shown["cond_dim"] = len(bias)
    if blocks := _blocks(tensors):
        shown["n_blocks"] = len(blocks)
    return shown


def _blocks(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the numbers of the blocks that have a tensor."""
    return {name.split(".")[1] for name in tensors if name.startswith("blocks.")}


def _check_sizes(config: DiTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Require a tensor for each block, before a network of the stated sizes is built, which could take minutes."""
    blocks = _blocks(tensors)
    if config.n_blocks > len(blocks):
        first = next(i for i in range(len(blocks) + 1) if str(i) not in blocks)
        raise fail(
            f"the checkpoint does not fit its config: n_blocks is {config.n_blocks}, but there are tensors of "
            f"{len(blocks)} blocks; missing is blocks.{first}.",
            "Check n_blocks in config.json.",
        )


def _check_fit(model: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Require the tensors of the network, no fewer, no more; the rotary constant alone may be absent."""
    expected = model.state_dict()
    missing = expected.keys() - tensors.keys() - {lightning.BUFFER}
    problems = [f"missing {name} {tuple(expected[name].shape)}" for name in missing]
    problems += [f"unexpected {name} {tuple(tensors[name].shape)}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        if not tensors[name].is_floating_point() or tensors[name].layout != torch.strided:
            problems.append(f"{name} is {tensors[name].dtype} {tensors[name].layout}, expected dense floating point")
        if expected[name].shape != tensors[name].shape:
            problems.append(f"{name} has {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}")
    stored = tensors.get(lightning.BUFFER)
    if stored is not None and stored.shape == expected[lightning.BUFFER].shape:
        exact = rotary_frequencies(2 * len(stored))
        if not torch.allclose(stored.float(), exact, rtol=1e-2, atol=1e-7):  # half precision passes, another base not
            problems.append(f"{lightning.BUFFER} is not that of base 10000")
    if problems:
        raise fail(
            "the checkpoint does not fit its config:\n    " + "\n    ".join(sorted(problems)),
            "Check hidden_dim, n_blocks, n_heads, cond_dim and vocab_size in config.json.",
        )
