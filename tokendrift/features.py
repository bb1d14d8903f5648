"""Frozen feature maps: soft embeddings (B, L, D) to features, one vector for each sequence or window."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokendrift._checks import check_count, check_frozen, check_mask, check_positive, check_tensor, fail
from tokendrift.encoders import as_encoder, input_embedding
from tokendrift.modes import without_autocast


class FeatureMap(Protocol):
    """Any frozen, differentiable callable from embeddings (B, L, D) to features (B, M), or (B, W, M) for W windows.

    It may take ``attention_mask``; the loss passes one only if it was given one. If whole sequences or windows can
    consist of padding, the map also has ``present(attention_mask) -> (B, W) bool``, (B, 1) without windows; features
    that are not present are ignored.
    """

    def __call__(self, embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map embeddings (B, L, D) to features (B, M) or (B, W, M)."""
        ...


class PooledFeatures(nn.Module):
    r"""Pool hidden layers of a frozen encoder into one unit vector for each sequence.

    .. math:: h = \frac{z}{\lVert z\rVert},\qquad
        z = \big[\tfrac1L\textstyle\sum_l H^{(a)}_l,\; \tfrac1L\sum_l H^{(b)}_l\big]

    over the chosen layers; the last two by default. Hidden states are cast to float32 before pooling.

    A mean over a whole sequence contains little information about which words occur next to each other. ``window``
    pools every w neighbouring positions instead and returns one vector for each of the L/w windows. All windows of a
    batch then form one set of features, with correspondingly more anchors and references. Several widths, as in
    ``window=(2, 8)``, return the windows of each width one after the other; None stands for the whole sequence. The
    last window of a sequence may be shorter. In a padded batch, a window or a whole sequence is the mean of its
    positions that are not padding. A window without any such position is not present and is ignored.

    Time-conditioned encoders run at clean time (sigma = 0) by default. With ``sigma`` above 0 they treat the text as
    noisy and rely more on the context.

    The encoder is deep-copied, put into evaluation mode and frozen, so that further training of the original does not
    move the features. If the model has a head, the head is not copied.

    Args:
        encoder: A module with ``hidden_states(embeds, attention_mask=...)``, such as `DiT`, or an encoder or causal
            model of transformers: any whose forward takes ``inputs_embeds``.
        layers: Indices into the list of hidden states; M is the sum of their widths. Default: the last two.
        window: w, the number of positions pooled into one vector, or several such numbers. Default: None, the whole
            sequence, as in the paper.
        sigma: Noise level ``-log alpha_t`` that a time-conditioned encoder receives. Default: 0, clean text.
        normalize: Divide by the Euclidean norm. Default: True.

    Raises:
        TokenDriftError: If the encoder shows no hidden states, is wrapped for several devices, or takes no sigma.

    Source: TokenDrift (arXiv 2605.19470), appendix F.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        layers: Sequence[int] = (-2, -1),
        window: int | Sequence[int | None] | None = None,
        sigma: float = 0.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        encoder = as_encoder(encoder)
        if not isinstance(layers, Sequence) or not layers or not all(isinstance(layer, int) for layer in layers):
            raise fail("layers must name at least one hidden layer, by index, such as (-2, -1).", layers=layers)
        check_positive("sigma", sigma, or_zero=True)
        if sigma != 0 and not (_takes(encoder, "sigma") and getattr(encoder, "time_conditioned", True)):
            raise fail(
                "sigma was given, but the encoder is not conditioned on a noise level.",
                "Leave sigma out, or let the encoder's hidden_states take sigma, (B,).",
                encoder=type(encoder).__name__,
                sigma=sigma,
            )
        self.layers, self.normalize, self.sigma = tuple(layers), normalize, sigma
        self.windows = _windows(window)
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> PooledFeatures:
        """Stay in evaluation mode, whatever the mode of the owner."""
        return self

    @property
    def embedding(self) -> Tensor:
        """E of the frozen encoder, (V, D), sharing its memory; see `tokendrift.encoders.input_embedding`."""
        return input_embedding(self.encoder)

    def forward(self, embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return features (B, M), or (B, W, M) with windows, in float32 or wider, from embeddings (B, L, D).

        Args:
            embeds: Hard or soft token embeddings, cast to the encoder's dtype.
            attention_mask: Positions that count, bool (B, L); padding neither attends nor is pooled. What has no such
                position is zero.

        Raises:
            TokenDriftError: If a layer does not exist or the mask has another shape.
        """
        check_tensor("embeds", embeds, ("B", "L", "D"))
        mask = None if attention_mask is None else check_mask("attention_mask", attention_mask, embeds.shape[:2])
        level = {} if self.sigma == 0 else {"sigma": embeds.new_full((len(embeds),), self.sigma)}
        encoder: Any = self.encoder
        dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), embeds.dtype)
        hidden = encoder.hidden_states(embeds.to(dtype), attention_mask=mask, **level)
        if any(not -len(hidden) <= layer < len(hidden) for layer in self.layers):
            raise fail(f"layers {self.layers} do not exist: the encoder returns {len(hidden)} hidden states.")
        with without_autocast(embeds.device):
            chosen = [hidden[layer] for layer in self.layers]
            if self.windows is None:
                features = torch.cat([masked_mean(layer, mask) for layer in chosen], dim=-1)
            else:
                means = [torch.cat([window_means(h, width, mask) for h in chosen], dim=-1) for width in self.windows]
                features = torch.cat(means, dim=1)
            return unit_vectors(features) if self.normalize else features

    def present(self, attention_mask: Tensor) -> Tensor:
        """Return which windows have a position that counts, bool (B, W); W is 1 without windows."""
        here = attention_mask.bool()[..., None].float()
        widths = self.windows or (None,)
        return torch.cat([window_means(here, width, attention_mask) for width in widths], dim=1)[..., 0] > 0


class IdentityFeatures(PooledFeatures):
    """Pool the soft embeddings themselves, without an encoder: a bag of words for each sequence or window.

    It represents which tokens occur, but not their order within a window. It costs little, so it is useful for a first
    test of a training loop and as a baseline for encoders.

    Args:
        window: As in `PooledFeatures`.
        normalize: Divide by the Euclidean norm.

    >>> IdentityFeatures()(torch.eye(2)[None])
    tensor([[0.7071, 0.7071]])
    """

    def __init__(self, *, window: int | Sequence[int | None] | None = None, normalize: bool = True) -> None:
        super().__init__(_Embeddings(), layers=(-1,), window=window, normalize=normalize)


class ConcatenatedFeatures(nn.Module):
    r"""Several feature maps side by side: squared distances add up with the given weights.

    .. math:: h = [\sqrt{w_1}\, h^{(1)}, \dots, \sqrt{w_K}\, h^{(K)}],\qquad \sum_k w_k = 1

    Unit vectors stay unit vectors. All maps must give the same number of windows, or none.

    Encoders with different embeddings can be combined too: concatenate the matrices, ``torch.cat([E1, E2], dim=1)``,
    and pass their ``widths``. Because the lift is linear, each map receives the soft embeddings of its own encoder.

    Args:
        maps: Frozen feature maps; used as they are, not copied.
        weights: w, brought to sum 1; equal by default.
        widths: Columns of the embeddings that each map takes, in order; all of them by default.

    Raises:
        TokenDriftError: If a map is not frozen, or the lengths differ.

    >>> both = ConcatenatedFeatures([lambda e: e.mean(dim=1), lambda e: e.amax(dim=1)], weights=[3, 1])
    >>> both(torch.tensor([[[0.0], [4.0]]]))
    tensor([[1.7321, 2.0000]])
    """

    def __init__(
        self,
        maps: Sequence[FeatureMap],
        *,
        weights: Sequence[float] | None = None,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not maps:
            raise fail("maps must hold at least one feature map.")
        for name, given in (("weights", weights), ("widths", widths)):
            if given is not None and len(given) != len(maps):
                raise fail(f"{name} must have one entry for each of the {len(maps)} maps.", **{name: given})
        for index, each in enumerate(maps):
            if isinstance(each, nn.Module):
                check_frozen(f"maps[{index}]", each)
        shares = [1.0] * len(maps) if weights is None else [check_positive("weights", weight) for weight in weights]
        self.maps = list(maps)
        self.frozen = nn.ModuleList(each for each in maps if isinstance(each, nn.Module))
        self.scales = [(share / sum(shares)) ** 0.5 for share in shares]
        self.widths = None if widths is None else [check_count("widths", width, least=1) for width in widths]
        super().train(False)

    def train(self, mode: bool = True) -> ConcatenatedFeatures:
        """Stay in evaluation mode, whatever the mode of the owner."""
        return self

    def forward(self, embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return features (B, M1 + ... + MK), or (B, W, M1 + ... + MK), from embeddings (B, L, D).

        Raises:
            TokenDriftError: If the widths do not add up to D, or the maps differ in their number of windows.
        """
        check_tensor("embeds", embeds, ("B", "L", "D"))
        if self.widths is not None and sum(self.widths) != embeds.shape[-1]:
            raise fail(f"widths {self.widths} must add up to D = {embeds.shape[-1]}.", embeds=embeds)
        parts = [embeds] * len(self.maps) if self.widths is None else embeds.split(self.widths, dim=-1)
        kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
        features = [each(part, **kwargs) for each, part in zip(self.maps, parts, strict=True)]
        if len({one.shape[:-1] for one in features}) > 1:
            shapes = ", ".join(str(tuple(one.shape)) for one in features)
            raise fail(
                f"the maps return different numbers of windows: {shapes}.",
                "Give all the same window, or put several widths into one map: PooledFeatures(window=(2, 8)).",
            )
        return torch.cat([scale * one for scale, one in zip(self.scales, features, strict=True)], dim=-1)

    def present(self, attention_mask: Tensor) -> Tensor | None:
        """Return which windows have a position that counts, bool (B, W), W = 1 without; None where no map says so."""
        found = (each.present(attention_mask) for each in self.maps if hasattr(each, "present"))
        return next((windows for windows in found if windows is not None), None)


class _Embeddings(nn.Module):
    def hidden_states(self, embeds: Tensor, *, attention_mask: Tensor | None = None) -> list[Tensor]:
        return [embeds]


def unit_vectors(features: Tensor) -> Tensor:
    """Return vectors divided by their norms; a zero vector stays zero.

    Those whose squares would overflow or vanish are first multiplied by a power of two, which changes no digit.
    """
    with torch.no_grad():
        size = features.abs().amax(dim=-1, keepdim=True)
        # Filled in the dtype of the features: numbers of Python alone would have the default dtype.
        scale = torch.ones_like(size).masked_fill_(size > 2.0**60, 2.0**-80).masked_fill_(size < 2.0**-40, 2.0**90)
    return nn.functional.normalize(features * scale, dim=-1)


def masked_mean(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the mean over the positions that count, (..., L, D) to (..., D), in float32 or wider; zero over none."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if attention_mask is None:
        return hidden.mean(dim=-2)
    kept = attention_mask.bool()[..., None]
    # Not a product with the mask: what stands at padding need not be finite.
    return torch.where(kept, hidden, 0.0).sum(dim=-2) / kept.sum(dim=-2).clamp_min(1)


def window_means(hidden: Tensor, width: int | None, attention_mask: Tensor | None) -> Tensor:
    """Return the mean over every ``width`` positions, (B, L, D) to (B, ceil(L / width), D); None is all of them."""
    batch, length = hidden.shape[:2]
    width = length if width is None else width
    rest = -length % width
    if rest and attention_mask is None:
        attention_mask = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    if attention_mask is not None:
        attention_mask = nn.functional.pad(attention_mask.bool(), (0, rest)).unflatten(1, (-1, width))
    return masked_mean(nn.functional.pad(hidden, (0, 0, 0, rest)).unflatten(1, (-1, width)), attention_mask)


def _windows(window: int | Sequence[int | None] | None) -> tuple[int | None, ...] | None:
    if window is None:
        return None
    several = tuple(window) if isinstance(window, Sequence) else (window,)
    if not several:
        raise fail("window must name at least one width, or be None for the whole sequence.", window=window)
    return tuple(None if width is None else check_count("window", width, least=1) for width in several)


def _takes(encoder: Any, name: str) -> bool:
    parameters = inspect.signature(encoder.hidden_states).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
