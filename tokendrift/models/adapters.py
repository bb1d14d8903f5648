"""Adapters that give networks from other libraries the signature ``(x_t (B, L), sigma (B,)) -> logits (B, L, V)``."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokendrift._checks import check_count, check_flag, check_ids, check_logits, check_mask_id, fail
from tokendrift.encoders import unwrapped

SCORES = ("ar", "score", "sedd")  # parameterizations whose output is no distribution of x0
LONGEST = 1024  # tokens of a sequence where nothing else is said: models may know many thousands of positions
POSITIONS = ("max_position_embeddings", "max_sequence_length")  # their number in the configurations of transformers


@dataclass(frozen=True)
class MaskedLMConfig:
    """What a `MaskedLMDenoiser` states of itself, with the names of `DiTConfig`.

    Attributes:
        vocab_size: V.
        mask_id: Id of the mask token.
        model_length: L, the length of a sequence where nothing else is said.
        shifted: Whether the logits at a position belong to the token after it.
    """

    vocab_size: int
    mask_id: int
    model_length: int
    shifted: bool = False
    random_input: ClassVar[None] = None  # the network has none and cannot be given one


class MaskedLMDenoiser(nn.Module):
    """Any masked language model that takes ids and returns logits, and has no time input (LLaDA, BERT).

    Args:
        module: Called with ids (B, L); returns logits (B, L, V), or an object that has them as ``logits``. It may be
            compiled, or wrapped by DistributedDataParallel or peft.
        mask_id: Id of the mask token; ``module.config.mask_token_id`` by default.
        vocab_size: V, the number of logits; ``module.config.vocab_size`` by default.
        shifted: Whether the logits at a position belong to the token after it, as those of Dream do, which was made
            from a causal model. They are moved by one position then; those of the first position stay. Default: False.
        model_length: L, the length of samples and of sequences to train on where nothing else is said. Default: the
            number of positions that the model knows, at most 1024.

    Attributes:
        config: These sizes, a `MaskedLMConfig`.
        has_dropout: Whether the dropout of the module is active in training mode. If it is False, the module stays in
            evaluation mode. Default: True.

    Raises:
        TokenDriftError: If either id or size is neither passed nor in the configuration, the model is causal, or a call
            passes more tokens than the model has positions or returns other shapes.

    >>> model = MaskedLMDenoiser(nn.Embedding(5, 5), mask_id=4, vocab_size=5)
    >>> model(torch.tensor([[0, 4, 2]]), torch.ones(1)).shape
    torch.Size([1, 3, 5])
    """

    time_conditioned = False

    def __init__(
        self,
        module: nn.Module,
        *,
        mask_id: int | None = None,
        vocab_size: int | None = None,
        shifted: bool = False,
        model_length: int | None = None,
    ) -> None:
        super().__init__()
        self.module, self.has_dropout = module, True
        inner = unwrapped(module.module if isinstance(module, DistributedDataParallel) else module)
        config = getattr(inner, "config", None)
        if _is_causal(inner):
            raise fail(
                "module is a causal language model, in which a position sees only the tokens before it: it cannot "
                "denoise.",
                "Pass a masked language model. If its attention has been made bidirectional, say so: "
                "module.config.is_causal = False.",
                module=type(inner).__name__,
            )
        size = _given("vocab_size", vocab_size, config, "vocab_size")
        mask = _given("mask_id", mask_id, config, "mask_token_id")
        check_mask_id(mask, size)
        self.positions = _positions(inner)
        length = min(self.positions or LONGEST, LONGEST) if model_length is None else model_length
        check_count("model_length", length, least=1, most=self.positions or 2**31)
        self.config = MaskedLMConfig(size, mask, length, check_flag("shifted", shifted))

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return self.config.mask_id

    @property
    def adapted(self) -> nn.Module:
        """The model inside, from which `TokenDriftLoss.from_encoder` builds its encoder."""
        return self.module

    def train(self, mode: bool = True) -> MaskedLMDenoiser:
        """Set the mode; without dropout, the module stays in evaluation mode."""
        return super().train(mode and self.has_dropout)

    def trainable_copy(self, dropout: float | None = None) -> MaskedLMDenoiser:
        """Return a copy to be trained, with the same weights; as in `DiT`, but dropout can only be kept or left out.

        Raises:
            TokenDriftError: If dropout is neither None nor 0.
        """
        if dropout:
            raise fail(
                "dropout can only be 0 or that of the model: a model of transformers has it in many places.",
                "Leave dropout out, set it to 0, or change the configuration of the model.",
                dropout=dropout,
            )
        copied = copy.deepcopy(self)
        copied.has_dropout = dropout is None
        return copied

    def forward(self, x_t: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Return logits (B, L, V) for noisy ids (B, L); sigma does not matter."""
        check_ids("x_t", x_t, self.vocab_size)
        if self.positions is not None and x_t.shape[1] > self.positions:
            raise fail(
                f"x_t has more tokens than the model has positions, {self.positions}.",
                "Pass shorter sequences: set length.",
                x_t=x_t,
            )
        output = self.module(x_t)
        logits = check_logits("module(x_t)", getattr(output, "logits", output), (*x_t.shape, self.vocab_size))
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if self.config.shifted else logits


class OfficialDenoiser(nn.Module):
    """A Lightning module of the MDLM or DUO repository, built by the code of that repository.

    Its ``forward(x, sigma (B, 1))`` returns log-probabilities instead of raw logits. They can be used as logits,
    because log-softmax leaves them unchanged, and applying SUBS twice is the same as applying it once. To use the
    averaged weights, activate them first, as ``module._eval_mode()`` does in DUO and
    ``module.ema.copy_to(module.backbone.parameters())`` in MDLM.

    Args:
        module: ``Diffusion`` of the MDLM repository, or ``MDLM``, ``DUO_BASE``, ``DUO`` or ``Distillation`` of
            DUO's. It brings ``vocab_size``, ``mask_index`` and ``time_conditioning``.

    Raises:
        TokenDriftError: If the module returns scores or next-token logits, or a call returns other shapes.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        kind = getattr(module, "parameterization", None)
        if kind in SCORES:
            raise fail(
                f"module has parameterization {kind!r}: its output is not a distribution of clean tokens.",
                "Pass a module trained as MDLM (subs) or DUO (mean).",
            )
        self.module = module
        self.vocab_size = _given("vocab_size", None, module, "vocab_size")
        self.mask_id: int | None = getattr(module, "mask_index", None)
        self.time_conditioned = bool(getattr(module, "time_conditioning", True))

    def forward(self, x_t: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Return log-probabilities (B, L, V) for noisy ids (B, L) and sigma (B,)."""
        check_ids("x_t", x_t, self.vocab_size)
        if sigma is None and not self.time_conditioned:
            sigma = torch.zeros(len(x_t), device=x_t.device)
        if sigma is None or sigma.shape != x_t.shape[:1]:
            raise fail("sigma must have shape (B,): one noise level -log(alpha_t) for each row.", sigma=sigma, x_t=x_t)
        return check_logits("module(x_t, sigma)", self.module(x_t, sigma[:, None]), (*x_t.shape, self.vocab_size))


def _is_causal(module: nn.Module) -> bool:
    """Tell whether a model of transformers is causal, by its configuration, its attention layers, or its name."""
    stated = getattr(getattr(module, "config", None), "is_causal", None)
    if isinstance(stated, bool):
        return stated
    layers = [each.is_causal for each in module.modules() if isinstance(getattr(each, "is_causal", None), bool)]
    return any(layers) if layers else type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _positions(module: nn.Module) -> int | None:
    """Return the number of positions that a model of transformers knows, None if it does not say."""
    config = getattr(module, "config", None)
    stated = next((getattr(config, name) for name in POSITIONS if isinstance(getattr(config, name, None), int)), None)
    if stated is None or stated < 1:
        return None
    # Models like RoBERTa leave out the positions up to the padding id.
    tables = [m for n, m in module.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    return stated - max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)


def _given(name: str, value: int | None, holder: Any, attribute: str) -> int:
    found = getattr(holder, attribute, None) if value is None else value
    if found is None:
        raise fail(f"{name} was not passed, and is not an attribute {attribute} of the model.", f"Pass {name}=....")
    return check_count(name, found)
