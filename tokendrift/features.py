"""Frozen feature maps: soft embeddings (B, L, D) to features, one vector a sequence or one a window."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tokendrift._checks import check_count, check_tensor, fail


class FeatureMap(Protocol):
    """Any frozen, differentiable callable from embeddings (B, L, D) to features (B, M), or (B, W, M) for W windows.

    It may take ``attention_mask``; the loss passes one only if it was given one.
    """

    def __call__(self, embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map embeddings (B, L, D) to features (B, M) or (B, W, M)."""
        ...


@runtime_checkable
class HiddenStates(Protocol):
    """An encoder that shows the output of every layer, as `tokendrift.models.DiT` does."""

    def hidden_states(self, embeds: Tensor, *, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Map embeddings (B, L, D) to a list of (B, L, D), input first."""
        ...


class PooledFeatures(nn.Module):
    r"""Pool hidden layers of a frozen encoder into one unit vector a sequence.

    .. math:: h = \frac{z}{\lVert z\rVert},\qquad
        z = \big[\tfrac1L\textstyle\sum_l H^{(a)}_l,\; \tfrac1L\sum_l H^{(b)}_l\big]

    over the chosen layers; the last two by default. Hidden states are cast to float32 before pooling.

    One mean over a whole sequence says little of which words stand together. ``window`` pools every w
    neighbours instead and gives one vector for each of the L/w windows; all windows of a batch then form one
    cloud, with as many more anchors and references.

    Time-conditioned encoders run at clean time (sigma = 0) unless told otherwise: at ``sigma`` above 0 they take
    the text for noisy and read more of the context.

    The encoder is deep-copied, put into evaluation mode and frozen, so that further training of the
    original does not move the features.

    Args:
        encoder: A module with ``hidden_states(embeds, attention_mask=...)``, such as `DiT`.
        layers: Indices into the list of hidden states; M = len(layers) * D.
        window: w, positions pooled into one vector; the whole sequence by default, as in the paper.
        sigma: Noise level ``-log alpha_t`` that a time-conditioned encoder is told.
        normalize: Divide by the Euclidean norm.

    Raises:
        TokenDriftError: If the encoder shows no hidden states or has fewer than the layers ask for.

    Source: TokenDrift (arXiv 2605.19470), appendix F.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        layers: Sequence[int] = (-2, -1),
        window: int | None = None,
        sigma: float = 0.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, HiddenStates):
            raise fail(
                "encoder must have a method hidden_states(embeds, attention_mask=...) -> list of (B, L, D).",
                "Wrap your encoder in a module with that method, or pass any frozen callable (B, L, D) -> (B, M) "
                "as feature_map.",
                encoder=type(encoder).__name__,
            )
        if not layers:
            raise fail("layers must name at least one hidden layer.", layers=layers)
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        self.layers, self.normalize = tuple(layers), normalize
        self.window = None if window is None else check_count("window", window, least=1)
        self.sigma = sigma
        super().train(False)

    def train(self, mode: bool = True) -> PooledFeatures:
        """Stay in evaluation mode, whatever the mode of the owner."""
        return self

    def forward(self, embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return features (B, M), or (B, L/w, M) with windows, in float32 or wider, from embeddings (B, L, D).

        Args:
            embeds: Hard or soft token embeddings, cast to the encoder's dtype.
            attention_mask: Positions that count, bool (B, L); padding neither attends nor is pooled.

        Raises:
            TokenDriftError: If a layer does not exist, L is no multiple of the window, or padding meets windows.
        """
        check_tensor("embeds", embeds, ("B", "L", "D"))
        if self.window is not None:
            self._check_windows(embeds, attention_mask)
        level = {} if self.sigma == 0 else {"sigma": embeds.new_full((len(embeds),), self.sigma)}
        hidden = self.encoder.hidden_states(embeds.to(_dtype(self.encoder)), attention_mask=attention_mask, **level)
        if any(not -len(hidden) <= layer < len(hidden) for layer in self.layers):
            raise fail(f"layers {self.layers} do not exist: the encoder shows {len(hidden)} hidden states.")
        with torch.autocast(embeds.device.type, enabled=False):
            pooled = [self._pool(hidden[layer], attention_mask) for layer in self.layers]
            features = torch.cat(pooled, dim=-1)
            return nn.functional.normalize(features, dim=-1) if self.normalize else features

    def _pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.window is None:
            return masked_mean(hidden, attention_mask)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return hidden.unflatten(1, (-1, self.window)).mean(dim=2)

    def _check_windows(self, embeds: Tensor, attention_mask: Tensor | None) -> None:
        if self.window is not None and embeds.shape[1] % self.window:
            raise fail(f"L must be a multiple of window = {self.window}.", embeds=embeds)
        if attention_mask is not None:
            raise fail(
                "attention_mask cannot be combined with window: windows of padding would enter the clouds.",
                "Pack the text into full sequences, or pool whole sequences (window=None).",
                attention_mask=attention_mask,
            )


def masked_mean(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the mean over the positions that count, (B, L, D) to (B, D), in float32 or wider."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if attention_mask is None:
        return hidden.mean(dim=1)
    weight = attention_mask.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)
