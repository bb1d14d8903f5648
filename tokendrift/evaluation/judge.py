"""The causal language model that scores samples, and its tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokendrift._checks import fail
from tokendrift.errors import TokenDriftError

BLOCK = 1 << 25  # logits turned into log-probabilities at a time


class Judge:
    """A causal language model behind one call: ids and mask in, NLL of every token out.

    Args:
        model: A transformers causal LM; any callable (ids (B, L) int64, attention_mask (B, L) int64) -> logits
            (B, L, V); or the name or folder of a transformers model.
        tokenizer: A transformers tokenizer or a ``tokenizers.Tokenizer``; with a name or folder the model's own.
        device: Where ids are sent; by default where the model's parameters are. A model loaded by name moves
            there, any other stays where it is.

    Attributes:
        window: Positions that the model knows, None if it does not say.
        vocab_size: V, None if the model does not say.
        eos_id: End-of-text token of the tokenizer or else of the model, None if neither has exactly one.
    """

    def __init__(self, model: object, tokenizer: Any = None, *, device: torch.device | str | None = None) -> None:
        if isinstance(model, str):
            model, tokenizer = load_judge(model, tokenizer, device)
        if not callable(model):
            raise fail(
                "judge must be a causal LM, a callable (ids, attention_mask) -> logits (B, L, V), or the name of one.",
                judge=model,
            )
        self.model: Callable[..., Any] = model
        self.tokenizer = tokenizer
        self.weights = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        here = self.weights.device if self.weights is not None else torch.device("cpu")
        self.device = torch.device(device) if device is not None else here
        config = getattr(model, "config", None)
        self.window = _count(getattr(config, "max_position_embeddings", None))
        self.vocab_size = _count(getattr(config, "vocab_size", None))
        own = _count(getattr(tokenizer, "eos_token_id", None))
        self.eos_id = own if own is not None else _count(getattr(config, "eos_token_id", None))
        named = _parameters(model.forward if isinstance(model, nn.Module) else model)
        self._keywords = {"use_cache": False} if "use_cache" in named else {}
        self._by_name = "input_ids" in named and "attention_mask" in named

    def logits(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, L, V) for ids and mask (B, L)."""
        ids, attention_mask = ids.to(self.device), attention_mask.to(self.device)
        if self._by_name:
            out = self.model(input_ids=ids, attention_mask=attention_mask, **self._keywords)
        else:
            out = self.model(ids, attention_mask)
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise fail(
                f"the judge must return logits (B, L, V) with (B, L) = {tuple(ids.shape)}, or an object with .logits.",
                "Wrap it in a function (ids, attention_mask) -> logits.",
                logits=logits,
            )
        return logits

    def precision(self, logits: Tensor) -> str:
        """Return the narrower dtype of weights and logits, and whether TF32 products were allowed."""
        dtypes = [logits.dtype] + ([self.weights.dtype] if self.weights is not None else [])
        narrow = str(min(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
        relaxed = logits.is_cuda and torch.get_float32_matmul_precision() != "highest"
        return "tf32" if narrow == "float32" and relaxed else narrow


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    r"""Return :math:`-\log p(x_l \mid x_{<l})` at every position, float64 (B, L) on the CPU; 0 at the first.

    Log-probabilities are taken in float32 or wider by one fused log-softmax, never as the logarithm of a
    softmax: a token 104 nats behind would underflow there.

    Args:
        logits: (B, L, V), any float dtype; row l predicts position l + 1.
        ids: (B, L).

    Raises:
        TokenDriftError: If an id lies outside V, or the logits give NaN.
    """
    vocab_size = logits.shape[-1]
    check_range(ids, vocab_size)
    wide = torch.promote_types(logits.dtype, torch.float32)
    targets = ids.to(logits.device).roll(-1, dims=1).flatten()
    rows = logits.flatten(0, 1)
    step = max(1, BLOCK // vocab_size)
    parts = [
        nn.functional.cross_entropy(rows[i : i + step].to(wide), targets[i : i + step], reduction="none")
        for i in range(0, len(rows), step)
    ]
    nll = torch.cat(parts).view(ids.shape).cpu().double().roll(1, dims=1)
    nll[:, 0] = 0
    if nll.isnan().any():
        raise fail("the judge's logits give NaN.", "Score in float32 or bfloat16; check the judge's weights.")
    return nll


def check_range(ids: Tensor, vocab_size: int | None) -> None:
    """Require ids of the judge's vocabulary, as far as its size is known."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        raise fail(
            f"samples hold ids from {low} to {high}, but ids are not negative.",
            "Labels of -100 mark padding: pass the samples without it, or an attention_mask.",
        )
    if vocab_size is not None and high >= vocab_size:
        raise fail(
            f"samples hold ids from {low} to {high}, but the judge's vocabulary V has {vocab_size} entries (0 to "
            f"{vocab_size - 1}).",
            "Ids of another tokenizer must be decoded: pass the texts, and the judge's own tokenizer.",
        )


def load_judge(name: str, tokenizer: Any = None, device: torch.device | str | None = None) -> tuple[nn.Module, Any]:
    """Return a causal LM of transformers in float32 by hub name or folder, with its tokenizer.

    Raises:
        TokenDriftError: If transformers is missing, or neither folder, cache nor network has the model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise TokenDriftError(
            f"loading the judge {name!r} needs transformers.\n"
            "  pip install 'tokendrift[eval]', or pass a model object or a callable as judge."
        ) from error
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name)
        tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TokenDriftError(
            f"the judge {name!r} could not be loaded: {str(error).splitlines()[0]}\n"
            "  Without network pass a local folder (config.json, model.safetensors, tokenizer.json), or a model object."
        ) from error
    return model.to(device=device, dtype=torch.float32).eval(), tokenizer


@contextmanager
def scoring(model: object) -> Iterator[None]:
    """Score without gradient and without dropout; every module gets its mode back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in and scripted callables show no signature
        return ()


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None
