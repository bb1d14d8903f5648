"""How the models that ship with the package were made, and how to make such models of your own text.

    python examples/study/pretrain.py FOLDER
    python examples/study/pretrain.py FOLDER --text book.txt

The parts are tokenizer, judge, uniform and masked, about an hour together on two CPU cores. Weights are stored in
float16, so that the four parts stay below 8 MB. `tokendrift demo --models FOLDER` refines the models of the folder.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from stages import check_base, encode, load_judge, make_process, train_base, train_judge, train_tokenizer
from tokenizers import Tokenizer

from tokendrift.corpus import read_splits
from tokendrift.models import load_denoiser, save_denoiser

PARTS = ("tokenizer", "judge", "uniform", "masked")
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}


def pretrain(
    folder: Annotated[Path, typer.Argument(help="Folder for the tokenizer and the models.")],
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text files in place of CPython's text.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Part to train; repeatable. Default: all.")] = None,
    base_steps: Annotated[int, typer.Option(help="Optimiser steps of each denoiser.")] = 8000,
    judge_steps: Annotated[int, typer.Option(help="Optimiser steps of the judge.")] = 2500,
) -> None:
    """Train tokenizer, judge and denoisers, each model into a folder of its own with a copy of the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = part or PARTS
    splits = read_splits(text or ())
    if "tokenizer" in parts:
        train_tokenizer(splits).save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    corpus = encode(splits, tokenizer)
    for name in (name for name in PARTS if name in parts and name != "tokenizer"):
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as place:
            if name == "judge":
                train_judge(corpus, judge_steps, Path(place), report)
                judge = load_judge(Path(place))
                judge.half()
                judge.save_pretrained(folder / name)
                (folder / name / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), encoding="utf-8")
            else:
                process = make_process(name)
                train_base(corpus, process, base_steps, Path(place), report)
                model, _ = load_denoiser(place)
                nelbo = check_base(model, process, corpus)
                print(f"  held-out NELBO {nelbo:.3f} nats, unigram entropy {corpus.unigram_entropy:.3f} nats")
                save_denoiser(model, folder / name, process, dtype=torch.float16)
        tokenizer.save(str(folder / name / "tokenizer.json"))


def report(step: int) -> None:
    """Print every 500th step."""
    if step % 500 == 0:
        print(f"  step {step}", flush=True)


if __name__ == "__main__":
    typer.run(pretrain)
