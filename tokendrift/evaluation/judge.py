"""The causal language model that scores samples, and its tokenizer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokendrift._checks import check_choice, check_device, fail
from tokendrift.errors import TokenDriftError
from tokendrift.evaluation.gguf_judge import folder_of_gguf, is_gguf
from tokendrift.models.hub import check_local, without_loading_bars
from tokendrift.models.tokenizer import same_tokenizer

DEFAULT_JUDGE = "gpt2-large"  # that of the literature
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK = 1 << 25  # logits turned into log-probabilities at a time


class Judge:
    """A causal language model that scores ids, with its tokenizer.

    Args:
        model: A transformers causal LM; any callable (ids (B, L) int64, attention_mask (B, L) int64) -> logits
            (B, L, V); or the name or folder of a transformers model, a GGUF file, or ``package:NAME``, see
            `load_judge`.
        tokenizer: A transformers tokenizer or a ``tokenizers.Tokenizer``; with a name or folder the model's own.
        device: Device to which ids are sent. A model loaded by name is moved there, any other model is not moved.
            Default: that of the model's parameters.
        precision: ``"float32"`` or ``"bfloat16"`` for a model loaded by name; any other keeps its own.
            Default: float32.
        revision: Branch, tag or commit of a model loaded by name. Default: None.

    Attributes:
        name: Name or folder; for an object that of its configuration or else its class.
        revision: Commit of the loaded weights where the hub names one, else as given; None for a local folder.
        window: Positions that the model knows, None if it does not say.
        vocab_size: V, None if the model does not say.
        start_id: Token that the tokenizer puts before every text, as those of Gemma and Llama do; None if it puts none.
            Such a judge is lost without it, so it is put before every sample, and before every window of a long one.
        eos_id: End-of-text token of the tokenizer or else of the model, None if neither has exactly one.
    """

    def __init__(
        self,
        model: object,
        tokenizer: Any = None,
        *,
        device: torch.device | str | None = None,
        precision: str | None = None,
        revision: str | None = None,
    ) -> None:
        if device is not None:
            check_device(device)
        # 1. The model: loaded by name, or taken as it is.
        named_by = str(model) if isinstance(model, (str, os.PathLike)) else None
        if named_by is not None:
            model, tokenizer = load_judge(
                named_by, tokenizer, device, precision=precision or "float32", revision=revision
            )
        elif precision is not None or revision is not None:
            raise fail(
                "precision and revision apply to a judge that is loaded by name; a model object is used as it is.",
                "Convert the model yourself, with .float() or .bfloat16().",
                judge=model,
                precision=precision,
                revision=revision,
            )
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
        # 2. What the model's configuration says of it.
        config = getattr(model, "config", None)
        own_name = getattr(config, "_name_or_path", "") or getattr(model, "__name__", "") or type(model).__name__
        self.name = named_by if named_by is not None else str(own_name)
        # What is local has no branches, whatever was asked for.
        local = named_by is not None and (Path(named_by).exists() or is_gguf(named_by))
        self.revision: str | None = getattr(config, "_commit_hash", None) or (None if local else revision)
        self.window = _count(getattr(config, "max_position_embeddings", None))
        self.vocab_size = _count(getattr(config, "vocab_size", None))
        own = _count(getattr(tokenizer, "eos_token_id", None))
        self.start_id = _start_of(tokenizer)
        self.eos_id = own if own is not None else _count(getattr(config, "eos_token_id", None))
        # 3. How the model is called.
        named = _parameters(model.forward if isinstance(model, nn.Module) else model)
        self._keywords = {"use_cache": False} if "use_cache" in named else {}
        self._by_name = "input_ids" in named and "attention_mask" in named
        self._compared: list[tuple[Any, bool]] = []
        self._heads: list[Callable[[Tensor], Tensor] | None] = []  # what `_head` found, once it is known

    def shares_tokenizer(self, tokenizer: Any) -> bool:
        """Return whether a tokenizer is known to read every text as the judge's does."""
        if tokenizer is None or self.tokenizer is None:
            return False
        for known, same in self._compared:  # large tokenizers take seconds to compare
            if known is tokenizer:
                return same
        comparable = all(hasattr(each, "get_vocab") for each in (tokenizer, self.tokenizer))
        same = tokenizer is self.tokenizer or (comparable and same_tokenizer(tokenizer, self.tokenizer))
        self._compared.append((tokenizer, same))
        return same

    def with_start(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Return ids with the judge's start token before each sequence that does not begin with it."""
        if self.start_id is None:
            return list(sequences)
        start = torch.tensor([self.start_id])
        return [ids if int(ids[0]) == self.start_id else torch.cat([start, ids]) for ids in sequences]

    def _call(self, ids: Tensor, attention_mask: Tensor, *, part: Any = None, **more: Any) -> Any:
        """Call the model, or a part of it."""
        ids, attention_mask = ids.to(self.device), attention_mask.to(self.device)
        called = self.model if part is None else part
        if self._by_name:
            return called(input_ids=ids, attention_mask=attention_mask, **self._keywords, **more)
        return called(ids, attention_mask, **more)

    def hidden(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden states (B, L, M) of a transformers model for ids and mask (B, L)."""
        states = None
        if hasattr(self.model, "config"):  # a model of transformers; other callables know no such option
            states = getattr(self._call(ids, attention_mask, output_hidden_states=True), "hidden_states", None)
        if not states:
            raise fail(
                "the judge returns no hidden states, from which features are computed.",
                "Use a causal language model of transformers, or pass features of your own.",
                judge=self.model,
            )
        last: Tensor = states[-1]
        return last

    def logits(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, L, V) for ids and mask (B, L)."""
        out = self._call(ids, attention_mask)
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise fail(
                f"the judge must return logits (B, L, V) with (B, L) = {tuple(ids.shape)}, or an object with .logits.",
                "Wrap it in a function (ids, attention_mask) -> logits.",
                logits=logits,
            )
        return logits

    def token_nll(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, str]:
        """Return `token_nll` of ids (B, L), and the precision of the judge.

        Logits of a transformers model that exceed one block are computed block by block from its hidden states, so
        that a large vocabulary needs little memory. A model whose logits are more than its output layer, perhaps with
        a soft cap, computes all of them at once.
        """
        head = None
        if self.vocab_size is not None and ids.numel() * self.vocab_size > BLOCK:
            if not self._heads:
                self._heads.append(self._head(ids[:1, :8], attention_mask[:1, :8]))
            head = self._heads[0]
        if head is None:
            logits = self.logits(ids, attention_mask)
            return token_nll(logits, ids), self.precision(logits)
        states = self._hidden_before_head(ids, attention_mask)
        return token_nll(states, ids, head=head), self.precision(states)

    def _hidden_before_head(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        base = self.model.base_model  # type: ignore[attr-defined]
        states: Tensor = self._call(ids, attention_mask, part=base).last_hidden_state
        return states

    def _head(self, ids: Tensor, attention_mask: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return what makes logits of hidden states, None if that is not known to give the model's own logits."""
        layer = getattr(self.model, "get_output_embeddings", lambda: None)()
        if not self._by_name or layer is None or getattr(self.model, "base_model", self.model) is self.model:
            return None
        cap = getattr(getattr(self.model, "config", None), "final_logit_softcapping", None)

        def head(states: Tensor) -> Tensor:
            logits: Tensor = layer(states)
            return logits if cap is None else cap * torch.tanh(logits / cap)

        # A scale or a bias that is not known here shows on a short prefix.
        found = head(self._hidden_before_head(ids, attention_mask)).float()
        return head if torch.equal(found, self.logits(ids, attention_mask).float()) else None

    def precision(self, logits: Tensor) -> str:
        """Return the narrower dtype of weights and logits, and whether TF32 products were allowed."""
        dtypes = [logits.dtype] + ([self.weights.dtype] if self.weights is not None else [])
        narrow = str(min(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
        return "tf32" if narrow == "float32" and logits.is_cuda and _relaxed() else narrow


def token_nll(logits: Tensor, ids: Tensor, *, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    r"""Return :math:`-\log p(x_l \mid x_{<l})` at every position, float64 (B, L) on the CPU; 0 at the first.

    Log-probabilities are computed in float32 or wider by one fused log-softmax. The logarithm of a softmax would
    underflow for a token 104 nats below the likeliest.

    Args:
        logits: (B, L, V), any float dtype; row l predicts position l + 1. With ``head`` hidden states (B, L, M).
        ids: (B, L).
        head: Makes logits (n, V) of hidden states (n, M), so that only a block of logits exists at a time.
            Default: None.

    Raises:
        TokenDriftError: If an id lies outside V, or the logits give NaN.
    """
    rows = logits.flatten(0, 1)
    vocab_size = (rows if head is None else head(rows[:1])).shape[-1]
    check_range(ids, vocab_size)
    wide = torch.promote_types(logits.dtype, torch.float32)
    targets = ids.to(logits.device).roll(-1, dims=1).flatten()
    step = max(1, BLOCK // vocab_size)
    parts = []
    for i in range(0, len(rows), step):
        block = rows[i : i + step] if head is None else head(rows[i : i + step])
        parts.append(nn.functional.cross_entropy(block.to(wide), targets[i : i + step], reduction="none"))
    nll = torch.cat(parts).view(ids.shape).cpu().double().roll(1, dims=1)
    nll[:, 0] = 0
    if nll.isnan().any():
        raise fail("the logits of the judge are NaN.", "Score in float32 or bfloat16; check the judge's weights.")
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


def load_judge(
    name: str,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    *,
    precision: str = "float32",
    revision: str | None = None,
) -> tuple[nn.Module, Any]:
    """Return a causal LM of transformers by hub name, folder or GGUF file, with its tokenizer.

    Weights come from safetensors files alone, and no code that ships with them is run. A GGUF file is converted once,
    see `tokendrift.evaluation.gguf_judge`.

    Args:
        name: Hub name, folder, ``.gguf`` file, or ``package:NAME`` for the only GGUF file of an installed package.
        tokenizer: Tokenizer to use instead of the model's own. Default: None.
        device: Device of the model. Default: None, for the CPU.
        precision: ``"float32"`` or ``"bfloat16"``. Default: ``"float32"``.
        revision: Branch, tag or commit. Default: None.

    Raises:
        TokenDriftError: If transformers is missing, or neither folder, cache nor network has the model.
    """
    check_choice("precision", precision, tuple(PRECISIONS))
    check_local(name, "judge")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise TokenDriftError(
            f"loading the judge {name!r} needs transformers.\n"
            "  pip install 'tokendrift[eval]', or pass a model object or a callable as judge."
        ) from error
    source: dict[str, Any] = {"revision": revision} if revision is not None else {}
    place = str(folder_of_gguf(name)) if is_gguf(name) else name
    try:
        with without_loading_bars():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                place, use_safetensors=True, trust_remote_code=False, **source
            )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **source)
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise TokenDriftError(
            f"the judge {name!r}{at} could not be loaded: {str(error).splitlines()[0]}\n"
            "  Without network pass a local folder (config.json, model.safetensors, tokenizer.json), or a model object."
        ) from error
    # The dtype is set after loading: releases of transformers differ in the dtype in which they load a checkpoint.
    return model.to(device=device, dtype=PRECISIONS[precision]).eval(), tokenizer


def _relaxed() -> bool:
    """Return whether products of float32 may be TF32 on CUDA, whichever of PyTorch's interfaces allowed it."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # from torch 2.9; the older function raises once this one was used
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in and scripted callables show no signature
        return ()


def _start_of(tokenizer: Any) -> int | None:
    start = _count(getattr(tokenizer, "bos_token_id", None))
    if start is None or not callable(tokenizer):
        return None
    return start if list(tokenizer("a")["input_ids"])[:1] == [start] else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None
