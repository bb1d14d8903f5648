"""A real refinement on one GPU: a base trained from scratch, then four refinements of it of a minute each.

The text is that of the files given, or what is installed: the documentation of CPython and the docstrings of the
installed packages. Samples of all models are written for `tokendrift evaluate`, with real text beside them.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tokendrift.corpus import SKIPPED_FOLDERS, docstrings, file_documents, prose, python_documents
from tokendrift.diffusion import MaskedDiffusion
from tokendrift.evaluation import distinct_n, sample_entropy, validation_nelbo
from tokendrift.models import DiT, DiTConfig, load_denoiser, save_denoiser
from tokendrift.sampling.to_file import SampleConfig, sample_to_file
from tokendrift.training import Denoising, LoopConfig, Optimization, make_config, refine, windows

if TYPE_CHECKING:
    from gpu_parts import Bench

EOS = "<|endoftext|>"
HELD_OUT = 0.03  # share of the documents
REFINEMENTS: dict[str, dict[str, Any]] = {
    "continuation": {"objective": "continuation", "learning_rate": 1e-4},
    "tokendrift": {"objective": "drift", "learning_rate": 3e-5},
    "pairs": {"preset": "pairs"},
    "matching": {"preset": "matching"},
}


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        vocabulary: Entries of the tokenizer.
        length: L.
        network: Width, blocks and heads.
        batch: Sequences of a step.
        characters: Most text.
        samples: Samples of each model at each NFE.
        nfes: Numbers of function evaluations.
        probe: Steps of the run that measures how long a step takes.
    """

    vocabulary: int = 16384
    length: int = 256
    network: tuple[int, int, int] = (512, 10, 8)
    batch: int = 128
    characters: int = 40_000_000
    samples: int = 128
    nfes: tuple[int, ...] = (4, 8, 16, 128)
    probe: int = 20


DRY = Sizes(300, 16, (32, 1, 2), 8, 200_000, 4, (4, 8), 4)


def refine_all(bench: Bench) -> None:
    """Train, refine and sample; three parts of the time for the base, and one for each refinement."""
    sizes = DRY if bench.dry else Sizes()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer, train, real = read_text(bench, sizes, folder)
        unit = (bench.left() - (5 if bench.dry else 30)) / (3 + len(REFINEMENTS))
        train_base(bench, sizes, tokenizer, train, 3 * unit, folder)
        write_samples(bench, sizes, "base", real, folder)
        for name, values in REFINEMENTS.items():
            try:
                run_refinement(bench, sizes, name, values, unit, folder)
                write_samples(bench, sizes, name, real, folder)
            except Exception as error:  # the others are still worth their time
                bench.add(model=name, note=f"failed: {type(error).__name__}: {str(error).splitlines()[0]}")
            pack(bench, folder)


# ---------------------------------------------------------------------------------------------- text


def read_text(bench: Bench, sizes: Sizes, folder: Path) -> tuple[Tokenizer, Tensor, Tensor]:
    """Return the tokenizer, the training text as a stream of ids, and held-out sequences (n, L); write text files."""
    documents = file_documents(bench.text) if bench.text else installed_text(bench.left() / 10)
    train, held_out, total = [], [], 0
    for document in documents:
        own = held_out if _share(document) < HELD_OUT else train
        own.append(document)
        total += len(document)
        if total > sizes.characters:
            break
    held_out = held_out or [train.pop()]
    tokenizer = train_tokenizer(train[:: 1 + total // 10_000_000], sizes.vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, part in (("train", train), ("real", held_out)):
        (folder / f"{name}.txt").write_text("\n".join(" ".join(each.split()) for each in part), encoding="utf-8")
    streams = [encoded(tokenizer, part) for part in (train, held_out)]
    bench.add(text="files" if bench.text else "installed", characters=total, tokens=len(streams[0]))
    return tokenizer, streams[0], next(windows(streams[1], sizes.length, 256, seed=0))


def installed_text(seconds: float) -> Iterator[str]:
    """Yield prose of the documentation of CPython, then of the installed packages, as long as there is time."""
    end = time.monotonic() + seconds
    for document in python_documents():
        yield from _paragraphs(document)
    root = Path(sysconfig.get_paths()["purelib"])
    paths = [path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)]
    random.Random(0).shuffle(paths)
    with ProcessPoolExecutor() as pool:
        for found in pool.map(_prose_of_file, paths, chunksize=50):
            yield from found
            if time.monotonic() > end:
                pool.shutdown(wait=False, cancel_futures=True)
                return


def _prose_of_file(path: Path) -> list[str]:
    return [text for document in docstrings(path) for text in _paragraphs(document)]


def _paragraphs(document: str) -> Iterator[str]:
    """Yield the prose of a document as one text, nothing for short ones."""
    text = " ".join(prose(document))
    if len(text) > 80:
        yield text


def _share(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def train_tokenizer(texts: Iterable[str], entries: int) -> Tokenizer:
    """Train a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"special_tokens": [EOS], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=entries, **options))
    return tokenizer


def encoded(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return texts as one stream of ids, an end-of-text token after each."""
    end = tokenizer.token_to_id(EOS)
    return torch.cat([torch.tensor([*each.ids, end]) for each in tokenizer.encode_batch(texts)])


# ---------------------------------------------------------------------------------------------- models


def train_base(bench: Bench, sizes: Sizes, tokenizer: Tokenizer, train: Tensor, seconds: float, folder: Path) -> None:
    """Train a masked base from scratch, as many steps as there is time for, and write it as a checkpoint."""
    start, device = time.monotonic(), torch.device(bench.device)
    process = MaskedDiffusion(tokenizer.get_vocab_size() + 1)
    width, blocks, heads = sizes.network
    torch.manual_seed(0)
    config = DiTConfig(process.vocab_size, sizes.length, width, 128, blocks, heads, 0.0, mask_id=process.mask_id)
    model = DiT(config).to(device)
    for block in model.blocks:
        block.compile(backend="aot_eager" if bench.dry else "inductor")
    loop = LoopConfig(1_000_000, learning_rate=6e-4, warmup=200, weight_decay=0.02, ema=0.999)
    optimization = Optimization(model, loop, autocast=torch.bfloat16)
    objective = Denoising(process, torch.Generator(device).manual_seed(1))
    batches = windows(train, sizes.length, sizes.batch, seed=2)
    # 1. A few steps tell how many there is time for, and with it the schedule of the learning rate.
    took = 0.0
    for step in range(sizes.probe):
        if step == sizes.probe // 2:
            _wait(device)
            took = time.monotonic()
        optimization.step(step, objective, [next(batches)])
    _wait(device)
    took = (time.monotonic() - took) / (sizes.probe - sizes.probe // 2)
    count = sizes.probe + (10 if bench.dry else max(10, int((seconds - time.monotonic() + start) / took)))
    optimization.config = replace(loop, steps=count)
    # 2. The rest.
    record = {}
    for step in range(sizes.probe, count):
        record = (
            optimization.step(step, objective, [next(batches)], log=step % 100 == 99 or step == count - 1) or record
        )
    optimization.average.swap()
    own = DiT(config)  # without compiled blocks
    own.load_state_dict(model.state_dict())
    save_denoiser(own, folder / "base", process)
    shutil.copy(folder / "tokenizer.json", folder / "base")
    bench.add(
        model="base",
        parameters=sum(parameter.numel() for parameter in own.parameters()),
        steps=count,
        seconds=time.monotonic() - start,
        tokens_a_second=sizes.batch * sizes.length / took,
        last_loss=record.get("cross_entropy", float("nan")),
    )


def run_refinement(bench: Bench, sizes: Sizes, name: str, values: dict[str, Any], seconds: float, folder: Path) -> None:
    """Refine the base by the command's own function: a short run tells how many steps there is time for."""
    start, options = time.monotonic(), dict(values)
    preset = options.pop("preset", None)
    options |= {
        "checkpoint": str(folder / "base"),
        "text": (str(folder / "train.txt"),),
        "documents": "line",
        "batch_size": sizes.batch // 2,
        "micro_batch": sizes.batch // 2,
        "precision": "fp32" if bench.dry else "bf16",
        "schedule": "cosine",
        "warmup": 30,
        "ema": 0.99,
        "evaluate_nfe": (),
        "evaluate_samples": 2,
        "checkpoint_every": 1_000_000,
        "tensorboard": False,
    }
    config = make_config(preset=preset, values=options)
    moments: list[float] = []
    probe = config.replace(steps=sizes.probe, output=str(folder / "probe"), pair_sequences=64)
    refine(probe, progress=False, on_step=lambda step: moments.append(time.monotonic()))
    shutil.rmtree(folder / "probe")
    # The host runs ahead of the device for a few steps at most: the loop reads figures at every tenth.
    half = len(moments) // 2
    took = (moments[-1] - moments[half]) / (len(moments) - 1 - half)
    count = sizes.probe if bench.dry else max(10, int((seconds - 2 * (time.monotonic() - start)) / took))
    refine(config.replace(steps=count, output=str(folder / name)), progress=False)
    bench.add(model=name, steps=count, ms_a_step=1e3 * took, seconds=time.monotonic() - start)


def write_samples(bench: Bench, sizes: Sizes, name: str, real: Tensor, folder: Path) -> None:
    """Measure a model on held-out text, and write samples at each NFE, with figures that need no judge."""
    model, process = load_denoiser(folder / name)
    nelbo = validation_nelbo(model.to(bench.device), process, real.to(bench.device), batch_size=64)
    bench.add(model=name, held_out_nelbo=nelbo)
    del model
    for nfe in sizes.nfes:
        start = time.monotonic()
        config = SampleConfig(
            str(folder / name), n=sizes.samples, steps=nfe, seed=7, batch_size=sizes.samples, device=bench.device
        )
        path = folder / f"{name}-{nfe}.jsonl"
        sample_to_file(config, path)
        _header, *lines = path.read_text(encoding="utf-8").splitlines()
        ids = torch.tensor([json.loads(line)["ids"] for line in lines])
        bench.add(
            samples=name,
            steps=nfe,
            seconds=time.monotonic() - start,
            sample_entropy=float(sample_entropy(ids).mean()),
            distinct_3=float(distinct_n(ids, 3)),
        )


def pack(bench: Bench, folder: Path) -> None:
    """Put samples, real text and tokenizer into one file beside the results."""
    with zipfile.ZipFile(bench.file.parent / "samples.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [*sorted(folder.glob("*.jsonl")), folder / "real.txt", folder / "tokenizer.json"]:
            archive.write(path, path.name)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
