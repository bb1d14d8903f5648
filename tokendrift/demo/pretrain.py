"""How the models beside this file were made: ``python -m tokendrift.demo.pretrain FOLDER [PART ...]``.

Parts: tokenizer, judge, uniform, masked (all by default); about an hour on two CPU cores. Weights are
stored in float16, so that the four together stay below 8 MB.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tokendrift.demo.stages import (
    DemoConfig,
    check_base,
    encode,
    load_judge,
    make_process,
    read_text,
    train_base,
    train_judge,
    train_tokenizer,
)
from tokendrift.models import load_denoiser, save_denoiser

PARTS = ("tokenizer", "judge", "uniform", "masked")


def pretrain(folder: Path, parts: tuple[str, ...] = PARTS) -> None:
    """Train the named parts on the text that CPython carries and write them below ``folder``."""
    from tokenizers import Tokenizer

    config = DemoConfig()
    folder.mkdir(parents=True, exist_ok=True)
    splits = read_text([])
    if "tokenizer" in parts:
        train_tokenizer(splits).save(str(folder / "tokenizer.json"))
    corpus = encode(splits, Tokenizer.from_file(str(folder / "tokenizer.json")))

    def report(step: int) -> None:
        if step % 500 == 0:
            print(f"  step {step}", flush=True)

    for part in (part for part in parts if part != "tokenizer"):
        print(part, flush=True)
        with tempfile.TemporaryDirectory() as place:
            if part == "judge":
                train_judge(corpus, config.judge_steps, Path(place), report)
                judge = load_judge(Path(place))
                judge.half()  # type: ignore[no-untyped-call]
                judge.save_pretrained(folder / part)
                continue
            process = make_process(part)
            train_base(corpus, process, config.base_steps, Path(place), report)
            model, _ = load_denoiser(place)
            print(
                f"  held-out NELBO {check_base(model, process, corpus):.3f} nats, "
                f"unigram entropy {corpus.unigram_entropy:.3f}"
            )
            save_denoiser(model, folder / part, process, dtype=torch.float16)


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]), tuple(sys.argv[2:]) or PARTS)
