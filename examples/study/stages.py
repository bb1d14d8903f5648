"""The parts that every comparison on real English needs: tokenizer, encoded text, base and judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokendrift._checks import fail
from tokendrift.corpus import Splits
from tokendrift.diffusion import MaskedDiffusion, Process, UniformDiffusion
from tokendrift.evaluation import validation_nelbo
from tokendrift.models import DiT, DiTConfig, save_denoiser
from tokendrift.training import Continuation, Denoising, LoopConfig, StepLoss, train, windows

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import GPT2LMHeadModel

EOS = 0
VOCABULARY = 1024  # BPE entries; the masked process adds one for its mask
LENGTH = 32  # tokens a sequence, about 16 words
JUDGE_WINDOW = 64  # longer than LENGTH: a decoded sample may come back as a few more tokens

OnStep = Callable[[int], object]


class Corpus(NamedTuple):
    """Text as models are trained and measured on it.

    Attributes:
        tokenizer: Byte-level BPE of `VOCABULARY` entries.
        denoiser: Token stream of the denoiser's split, int64 (n,).
        judge: Token stream of the judge's split.
        held_out: Windows of real text that nothing was trained on, int64 (512, L).
        unigram_entropy: Entropy of the tokens of the denoiser's split in nats, which a model without context reaches.
    """

    tokenizer: Tokenizer
    denoiser: Tensor
    judge: Tensor
    held_out: Tensor
    unigram_entropy: float


def train_tokenizer(splits: Splits) -> Tokenizer:
    """Train a byte-level BPE of `VOCABULARY` entries on the two training splits.

    Raises:
        TokenDriftError: If the text gives fewer entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*splits.denoiser, *splits.judge], trainer)
    if tokenizer.get_vocab_size() < VOCABULARY:
        raise fail(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()} entries, {VOCABULARY} are needed.",
            "Pass more text.",
        )
    return tokenizer


def encode(splits: Splits, tokenizer: Tokenizer) -> Corpus:
    """Tokenise the splits. An end-of-text token stands after each paragraph."""

    def stream(paragraphs: list[str]) -> Tensor:
        ids: list[int] = []
        for encoding in tokenizer.encode_batch(paragraphs):
            ids += [*encoding.ids, EOS]
        return torch.tensor(ids)

    denoiser, judge, held_out = (stream(part) for part in splits)
    share = torch.bincount(denoiser, minlength=VOCABULARY).double() / len(denoiser)
    real = next(windows(held_out, LENGTH, 512, seed=0))
    return Corpus(tokenizer, denoiser, judge, real, torch.special.entr(share).sum().item())


def make_process(name: str) -> Process:
    """Return the corruption process, ``"uniform"`` or ``"masked"``, over the vocabulary."""
    return UniformDiffusion(VOCABULARY) if name == "uniform" else MaskedDiffusion(VOCABULARY + 1)


def make_denoiser(process: Process) -> DiT:
    """Return an untrained denoiser of about 1.2 million parameters."""
    uniform = isinstance(process, UniformDiffusion)
    sizes = DiTConfig(
        process.vocab_size, LENGTH, hidden_dim=128, cond_dim=32, n_blocks=4, n_heads=4, time_conditioning=uniform
    )
    return DiT(sizes)


def train_base(corpus: Corpus, process: Process, steps: int, folder: Path, on_step: OnStep | None = None) -> None:
    """Train a denoiser from scratch and write it as a checkpoint folder.

    Uniform-state models learn by their NELBO; masked ones by the unweighted cross-entropy, since under the
    1/t-weighted bound a model of this size stays at unigrams.
    """
    torch.manual_seed(0)
    model = make_denoiser(process)
    kind = Continuation if isinstance(process, UniformDiffusion) else Denoising
    loop = LoopConfig(steps, learning_rate=1.5e-3, warmup=200, weight_decay=0.02, ema=0.999)
    objective = kind(process, torch.Generator().manual_seed(1))
    records = train(model, objective, windows(corpus.denoiser, LENGTH, loop.batch_size, seed=2), loop, on_step=on_step)
    save_denoiser(model, folder, process)
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")


def train_judge(corpus: Corpus, steps: int, folder: Path, on_step: OnStep | None = None) -> None:
    """Train a causal language model of about 0.9 million parameters on the judge's split alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=JUDGE_WINDOW,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.2,
        embd_pdrop=0.2,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    model = GPT2LMHeadModel(sizes)

    def next_token(model: Callable[..., Any], ids: Tensor, /, *, log: bool = False) -> StepLoss:
        logits = model(ids).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:])
        return StepLoss(loss, {"cross_entropy": loss.detach()})

    loop = LoopConfig(steps, learning_rate=1.5e-3, warmup=200, weight_decay=0.1, ema=0.995)
    train(model, next_token, windows(corpus.judge, LENGTH + 8, loop.batch_size, seed=3), loop, on_step=on_step)
    model.save_pretrained(folder)


def load_judge(folder: Path) -> GPT2LMHeadModel:
    """Return the judge in float32 and evaluation mode."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    judge = GPT2LMHeadModel.from_pretrained(folder)
    judge.float()  # type: ignore[no-untyped-call]  # stored in float16; releases differ in what they load it as
    judge.eval()  # type: ignore[no-untyped-call]
    return judge


def check_base(model: nn.Module, process: Process, corpus: Corpus) -> float:
    """Return the held-out NELBO of a base in nats per token, and refuse a base that knows only unigrams.

    Raises:
        TokenDriftError: If the NELBO is not at least 0.3 nats below the unigram entropy.
    """
    nelbo = validation_nelbo(model, process, corpus.held_out)
    if not nelbo < corpus.unigram_entropy - 0.3:
        raise fail(
            f"the base knows little more than unigrams: NELBO {nelbo:.2f} nats per token on held-out text, unigram "
            f"entropy {corpus.unigram_entropy:.2f}. Refining it would show nothing.",
            "Pass more text, or train the base for longer.",
        )
    return nelbo
