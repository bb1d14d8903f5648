"""Judges in GGUF files: converted to a folder of transformers once, which is then kept in a cache."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from tokendrift._checks import fail
from tokendrift.files import file_digest, writable

PACKAGE = "package:"


def is_gguf(name: str) -> bool:
    """Return whether a judge is named as a GGUF file, or as a package that holds one."""
    return name.startswith(PACKAGE) or name.endswith(".gguf")


def folder_of_gguf(name: str) -> Path:
    """Return the folder of transformers with the model and tokenizer of a GGUF file.

    The first call converts the file to float32, which takes some seconds and the package ``gguf`` (extra ``gguf``).
    The folder is kept in ``tokendrift/judges`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Args:
        name: Path of a ``.gguf`` file, or ``package:NAME`` for the only such file of an installed package.

    Raises:
        TokenDriftError: If there is no such file, it cannot be converted, or the cache cannot be written.
    """
    file = _file_of_package(name.removeprefix(PACKAGE)) if name.startswith(PACKAGE) else Path(name)
    if not file.is_file():
        raise fail(f"the judge {name} is no file.", "Pass the path of a GGUF file, or package:NAME.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokendrift" / "judges"
    folder = cache / f"{file.stem}-{file_digest(file)[:16]}"
    if not folder.is_dir():
        with writable(cache):
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as part:  # an interrupted conversion leaves nothing behind
                _convert(file, Path(part) / "judge")
                if not folder.is_dir():  # another process may have been faster
                    (Path(part) / "judge").replace(folder)
    return folder


def _file_of_package(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = sorted(file for place in places for file in Path(place).rglob("*.gguf"))
    if len(found) != 1:
        what = f"has {len(found)} GGUF files" if places else "is not an installed package"
        raise fail(
            f"the judge {PACKAGE}{package} cannot be loaded: {package} {what}.",
            "Install a package that holds exactly one GGUF file, or pass the path of the file.",
        )
    return found[0]


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": file.name}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    except ImportError as error:
        raise fail(f"{error}; GGUF files need it.", "Install it with pip install 'tokendrift[gguf]'.") from None
    except (OSError, ValueError, KeyError) as error:
        raise fail(f"{file} cannot be converted: {str(error).splitlines()[0]}", "Pass another judge.") from error
    # The weights are dequantised, but transformers refuses to save a model that it believes to be quantised.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
