"""Masked language models of transformers, and adapters of peft on them: how they are recognised, loaded and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tokendrift._checks import fail
from tokendrift.errors import TokenDriftError
from tokendrift.files import foreign_errors
from tokendrift.models import hub
from tokendrift.models.adapters import MaskedLMDenoiser
from tokendrift.models.tokenizer import load_tokenizer
from tokendrift.models.weight_files import CONFIG, read_json

ADAPTERS = "adapter_config.json"
OPTIONS = "tokendrift.json"  # beside a model: what the configuration of transformers has no place for
STORED = ("vocab_size", "mask_id", "model_length", "shifted", "schedule")  # in OPTIONS
FIELDS = (*STORED, "base_model", "trust_remote_code")
TOKENIZER_FILES = ("*.txt", "*.model")
MASKED_LM = "AutoModelForMaskedLM"
OWN_CLASSES = (MASKED_LM, "AutoModel", "AutoModelForCausalLM")  # the first that a model with its own code names
ASK_FOR_CODE = (
    "Read that code, and if you trust it pass config={'trust_remote_code': True}, on the command line "
    "--checkpoint-config trust_remote_code=true."
)


def stated_config(folder: Path, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of a folder of transformers or peft; None for a folder of any other kind.

    Args:
        folder: Folder or file of a checkpoint.
        given: Fields of the user, which replace those of the folder. They alone can permit remote code.
    """
    adapters = (folder / ADAPTERS).is_file()
    if not adapters and not (folder / CONFIG).is_file():
        return None
    found = read_json(folder / (ADAPTERS if adapters else CONFIG))
    kind = str(given.get("model_type", found.get("model_type"))).lower()
    ours = kind in ("mdlm", "duo") or "bd3" in kind or {"graph", "noise"} <= found.keys()
    if not adapters and (ours or not {"architectures", "auto_map", "transformers_version"} & found.keys()):
        return None
    unknown = set(given) - {*FIELDS, "model_type"}
    if unknown:
        raise fail(
            f"config has fields that a model of transformers does not take: {', '.join(sorted(unknown))}.",
            f"The fields are {', '.join(FIELDS)}.",
        )
    found = {name: value for name, value in found.items() if name not in FIELDS or name == "vocab_size"}
    if (folder / OPTIONS).is_file():
        found |= {name: value for name, value in read_json(folder / OPTIONS).items() if name in STORED}
    return found | dict(given)


def base_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Return the folder of the whole model: for adapters that of their base model, which may be on the hub.

    Raises:
        TokenDriftError: If there is none, it is no masked language model, or it needs code that is not trusted.
    """
    if (folder / ADAPTERS).is_file():
        named = config.get("base_model") or config.get("base_model_name_or_path")
        if not named:
            raise fail(f"{folder / ADAPTERS} does not name the base model.", "Pass config={'base_model': FOLDER}.")
        hub.check_local(named, f"the base model of the adapters in {folder},")
        folder = Path(named)
        if not folder.exists():
            own = config.get("revision") if named == config.get("base_model_name_or_path") else None
            folder = hub.download(str(named), own, further_files(config))
    if (folder / CONFIG).is_file():
        _automatic_class(folder, bool(config.get("trust_remote_code")))
        return folder
    raise fail(f"{folder} has no {CONFIG}.", "Pass the folder of a model of transformers.")


def further_files(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the patterns of the files that a model of transformers needs from the hub beside weights and JSON."""
    return (*TOKENIZER_FILES, "*.py") if config.get("trust_remote_code") else TOKENIZER_FILES


def _automatic_class(folder: Path, trusted: bool) -> str:
    """Return the name of the automatic class of transformers that loads the model in a folder."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as NATIVE
    except ImportError as error:
        raise fail(f"{error}; it is needed to load {folder}.", "pip install 'tokendrift[hf]'") from None
    config = read_json(folder / CONFIG)
    stated = config.get("auto_map")
    own = stated if isinstance(stated, dict) else {}
    named = next((name for name in OWN_CLASSES if name in own), None)
    if named is not None and trusted:
        return named
    if config.get("model_type") in NATIVE:
        return MASKED_LM
    if named is not None:
        raise fail(f"the model in {folder} runs code of its own, {own[named]}.", ASK_FOR_CODE)
    raise fail(
        f"{folder} holds a model of transformers that is not known as a masked language model.",
        "Build it with its own class, and pass MaskedLMDenoiser(model, mask_id=...) to sample and to a training loop "
        "of your own. Causal models are not denoisers.",
        model_type=config.get("model_type"),
        architectures=config.get("architectures"),
    )


def load_masked_lm(folder: Path, base: Path, config: Mapping[str, Any], tokenizer: Path) -> MaskedLMDenoiser:
    """Load a masked language model, in evaluation mode and on the CPU.

    Args:
        folder: Its folder, or that of its adapters.
        base: Folder of the whole model, the same or that of the base model.
        config: What `stated_config` returned.
        tokenizer: Folder of the tokenizer, whose mask token counts if no configuration states the mask.

    Raises:
        TokenDriftError: If it cannot be loaded, weights are missing, or a size is not known.
    """
    trusted = bool(config.get("trust_remote_code"))
    remedy = "Its files may be incomplete. Otherwise build the model yourself and pass MaskedLMDenoiser(model)."
    with foreign_errors(f"{base} cannot be loaded by transformers", remedy), hub.without_loading_bars():
        import transformers

        loader = getattr(transformers, _automatic_class(base, trusted))
        model, about = loader.from_pretrained(str(base), trust_remote_code=trusted, output_loading_info=True)
    missing = sorted(about["missing_keys"])
    if missing:
        raise fail(
            f"{base} lacks weights of {type(model).__name__}: {', '.join(missing[:8])}{', ...' * (len(missing) > 8)}.",
            "Pass the folder of a whole masked language model, its output layer included.",
        )
    if folder != base:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise fail(f"{error}; it is needed to load the adapters in {folder}.", "pip install peft") from None
        with foreign_errors(f"the adapters in {folder} cannot be loaded by peft", "Fetch the folder again."):
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    settings = getattr(model, "config", None)
    mask = config.get("mask_id", getattr(settings, "mask_token_id", None))
    if mask is None:  # older folders have a vocabulary instead of a tokenizer.json, which is read as well
        with suppress(TokenDriftError):  # the error below says what to do
            mask = getattr(load_tokenizer(tokenizer, fetch=False, trusted=trusted), "mask_token_id", None)
    if mask is None:
        raise fail(
            f"{folder} does not state the mask: neither a tokenizer in it nor its configuration has a mask token.",
            "Pass config={'mask_id': ...}, on the command line --checkpoint-config mask_id=ID.",
        )
    # The logits of Dream, which was made from a causal model, belong to the next token.
    names = [type(model).__name__, *(getattr(settings, "architectures", None) or ())]
    shifted = config.get("shifted", any(str(name).startswith("Dream") for name in names))
    sizes = {name: config.get(name) for name in ("vocab_size", "model_length")}
    return MaskedLMDenoiser(model, mask_id=mask, shifted=shifted, **sizes).eval()


def save_masked_lm(denoiser: MaskedLMDenoiser, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model as transformers does, adapters of peft as peft does.

    Args:
        denoiser: The denoiser; its own weights are not read and may be on the meta device.
        state: Weights by their names in the denoiser; for adapters, theirs suffice.
        folder: An empty folder.

    Raises:
        TokenDriftError: If the denoiser holds another module, or one with several adapters.
    """
    model: Any = denoiser.module
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    if not callable(getattr(model, "save_pretrained", None)):
        raise fail(
            "the module in the denoiser is not a model of transformers or peft, so it cannot be written as one.",
            "Save it yourself, for instance with torch.save(denoiser.module.state_dict(), file).",
            module=type(model),
        )
    adapters = list(getattr(model, "peft_config", ()))
    if len(adapters) > 1:
        raise fail("the model has several adapters.", "Keep one: model.delete_adapter(NAME).", adapters=adapters)
    prefix = "module.module." if isinstance(denoiser.module, DistributedDataParallel) else "module."
    with hub.without_loading_bars():
        model.save_pretrained(str(folder), state_dict={n.removeprefix(prefix): t for n, t in state.items()})
    (folder / "README.md").unlink(missing_ok=True)  # peft writes one; the folder may have its own
    for name in adapters:  # those of another name than "default" get a folder of their own
        if (folder / name).is_dir():
            for path in (folder / name).iterdir():
                path.replace(folder / path.name)
            (folder / name).rmdir()


def write_options(options: Mapping[str, Any], folder: Path) -> None:
    """Write what `load_denoiser` needs to know of a denoiser beside the configuration of transformers."""
    (folder / OPTIONS).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def write_configuration(model: Any, options: Mapping[str, Any], folder: Path) -> None:
    """Write what belongs beside the weights of a model of transformers, its own code included."""
    from transformers.dynamic_module_utils import custom_object_save

    model.config.architectures = [type(model).__name__]
    if getattr(model, "_auto_class", None) is not None:
        custom_object_save(model, str(folder), config=model.config)
    model.config.save_pretrained(str(folder))
    write_options(options, folder)
