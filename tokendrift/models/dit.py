"""The MDLM / DUO backbone: a bidirectional transformer with rotary positions and adaptive layer norm.

Plain PyTorch attention, no compiled extension. Parameter names are those of the released checkpoints
(`kuleshov-group/mdlm`, `s-sahoo/duo`, models/dit.py), so that their tensors load by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokendrift._checks import check_count, check_flag, check_fraction, check_ids, check_mask_id, fail
from tokendrift.lift import LinearLogits
from tokendrift.models.layers import Embedding, LayerNorm, Rotary, SigmaMap, modulate, rotate
from tokendrift.models.random_input import RandomMaskEmbedding

T = TypeVar("T")


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a `DiT`, with the names of the released ``config.json`` files.

    Attributes:
        vocab_size: V, the mask entry included where there is one.
        model_length: L, the longest sequence it was trained on.
        hidden_dim: D, the width.
        cond_dim: Width of the conditioning vector.
        n_blocks: Number of transformer blocks.
        n_heads: Number of attention heads; divides hidden_dim.
        dropout: Dropout probability on the two residual branches.
        time_conditioning: Whether the network uses sigma (DUO) or zeros instead (MDLM).
        mask_id: Id of the mask token, None for uniform-state models.
        random_input: Number K of random numbers that each masked position is given, see `RandomMaskEmbedding`. Default:
            0, a model without random input.
    """

    vocab_size: int
    model_length: int = 1024
    hidden_dim: int = 768
    cond_dim: int = 128
    n_blocks: int = 12
    n_heads: int = 12
    dropout: float = 0.1
    time_conditioning: bool = False
    mask_id: int | None = None
    random_input: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "model_length", "hidden_dim", "cond_dim", "n_blocks", "n_heads"):
            check_count(
                name, getattr(self, name), least=1, most=2**31 if name in ("vocab_size", "model_length") else 2**24
            )
        check_fraction("dropout", self.dropout, closed=True)
        check_flag("time_conditioning", self.time_conditioning)
        if self.mask_id is not None:
            check_count("mask_id", self.mask_id)
        if self.hidden_dim % (2 * self.n_heads):
            raise fail(
                f"hidden_dim must be a multiple of 2 * n_heads = {2 * self.n_heads} (rotary positions pair channels).",
                hidden_dim=self.hidden_dim,
                n_heads=self.n_heads,
            )
        check_mask_id(self.mask_id, self.vocab_size)
        if check_count("random_input", self.random_input, most=2**24) and self.mask_id is None:
            raise fail(
                "random_input gives numbers to masked positions, and this model has no mask.",
                "Leave it out for uniform-state models, whose input is random already.",
                random_input=self.random_input,
            )


class TransformerBlock(nn.Module):
    """One transformer block: attention and a two-layer network, both modulated and gated by sigma."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.norm1 = LayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * width)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(
        self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        parts = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        mixed = self.attention(modulate(self.norm1(x), shift1, scale1), cos, sin, attention_mask)
        x = torch.addcmul(x, gate1, F.dropout(mixed, self.dropout, self.training))
        mixed = self.mlp(modulate(self.norm2(x), shift2, scale2).to(self.attn_qkv.weight.dtype))
        return torch.addcmul(x, gate2, F.dropout(mixed, self.dropout, self.training))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None) -> Tensor:
        qkv = self.attn_qkv(x.to(self.attn_qkv.weight.dtype))
        q, k, v = rearrange(qkv, "b l (three h c) -> three b h l c", three=3, h=self.n_heads)
        seen = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=seen)
        return self.attn_out(rearrange(mixed, "b h l c -> b l (h c)"))


class OutputLayer(nn.Module):
    """Final norm, modulation and the untied vocabulary head."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = LayerNorm(config.hidden_dim)
        self.linear = nn.Linear(config.hidden_dim, config.vocab_size)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.hidden_dim)
        for layer in (self.linear, self.adaLN_modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        head: Callable[[LinearLogits], T] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor | T:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        hidden = modulate(self.norm_final(x), shift, scale).to(self.linear.weight.dtype)
        if wanted is not None:
            hidden = hidden[wanted]
        if head is None:
            logits: Tensor = self.linear(hidden)
            return logits
        weight, device = self.linear.weight, hidden.device.type
        if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:  # the operands that autocast would take
            hidden, weight = (operand.to(torch.get_autocast_dtype(device)) for operand in (hidden, weight))
        with torch.autocast(device, enabled=False):
            return head(LinearLogits(hidden, weight, self.linear.bias))


class DiT(nn.Module):
    """Denoiser of MDLM and DUO: noisy ids and sigma in, raw logits out.

    SUBS and log-softmax belong to the process, not to the network. The network follows the denoiser protocol
    ``(x_t (B, L) int64, sigma (B,) or None) -> logits (B, L, V)``.

    Args:
        config: The sizes.

    >>> model = DiT(DiTConfig(vocab_size=11, model_length=8, hidden_dim=16, cond_dim=4, n_blocks=1, n_heads=2))
    >>> model(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2)).shape
    torch.Size([2, 8, 11])
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        if config.random_input and config.mask_id is not None:
            self.vocab_embed = RandomMaskEmbedding(
                config.vocab_size, config.hidden_dim, config.mask_id, config.random_input
            )
        self.sigma_map = SigmaMap(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_blocks))
        self.output_layer = OutputLayer(config)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def mask_id(self) -> int | None:
        """Id of the mask token, None for uniform-state models."""
        return self.config.mask_id

    @property
    def time_conditioned(self) -> bool:
        """Whether sigma matters."""
        return self.config.time_conditioning

    def trainable_copy(self, dropout: float | None = None) -> DiT:
        """Return a float32 copy on the same device, to be trained; dropout replaces that of the configuration."""
        copied = DiT(self.config if dropout is None else dataclasses.replace(self.config, dropout=dropout))
        copied.load_state_dict(self.state_dict())
        return copied.to(self.output_layer.linear.weight.device)

    def forward(
        self,
        x_t: Tensor,
        sigma: Tensor | None = None,
        *,
        embed: Callable[[Tensor], Tensor] | None = None,
        head: Callable[[LinearLogits], T] | None = None,
        wanted: Tensor | None = None,
        normals: Tensor | None = None,
    ) -> Tensor | T:
        """Compute logits.

        The two callables replace the first and the last layer. They are called inside this method, because a module
        that DDP or FSDP has wrapped can only be entered here: FSDP has gathered the weights by then.

        Args:
            x_t: Noisy ids (B, L) of an integer dtype.
            sigma: ``-log alpha_t``, shape (B,). Needed with time conditioning, unused without.
            embed: Called with the embedding matrix (V, D) in place of the look-up of x_t; returns embeddings (B, L, D).
                `SoftCorruption.denoise` passes the soft inputs of DUO's curriculum this way.
            head: Called instead of the product with the vocabulary, outside autocast, with its operands as
                `LinearLogits` in the dtype of the logits. A loss that accepts these needs no tensor (B, L, V):
                ``head=lambda logits: drift(logits, x_0, noisy_ids=x_t)``.
            wanted: Positions whose logits are returned, bool (B, L), see `logits_at`. Default: all.
            normals: Standard normal numbers (B, L, K) of a model with a random input; `tokendrift.sampling.sample`
                passes those of the row and the step. Default: drawn from PyTorch's global generator.

        Returns:
            Logits (B, L, V), or (K, V) at wanted positions, in the parameters' dtype, or in that of autocast inside it;
            with ``head``, what it returns.

        Raises:
            TokenDriftError: If x_t does not hold ids (B, L) of the vocabulary, sigma is missing or has another shape,
                or ``embed`` returns another shape.
        """
        check_ids("x_t", x_t, self.vocab_size)
        condition = self.condition(len(x_t), sigma)
        if normals is not None and not self.config.random_input:
            raise fail("normals were given, but the model has no random input.", "Leave them out.", normals=normals)
        embeds = self.vocab_embed(x_t, embed, *([] if normals is None else [normals]))
        if embeds.shape != (*x_t.shape, self.config.hidden_dim):
            raise fail(f"embed must return (B, L, D) = {(*x_t.shape, self.config.hidden_dim)}.", embeds=embeds)
        result: Tensor | T = self.output_layer(self._blocks(embeds, condition, None)[-1], condition, head, wanted)
        return result

    def logits_at(self, x_t: Tensor, sigma: Tensor | None, wanted: Tensor, *, normals: Tensor | None = None) -> Tensor:
        """Return the logits at some positions only, which saves most of the product with the vocabulary.

        Args:
            x_t: Noisy ids (B, L).
            sigma: As in `forward`.
            wanted: Positions, bool (B, L).
            normals: As in `forward`.

        Returns:
            Shape (K, V), row after row.
        """
        # A call of the module: hooks, FSDP and subclasses take part.
        logits: Tensor = self(x_t, sigma, wanted=wanted, normals=normals)
        return logits

    def hidden_states(
        self, embeds: Tensor, sigma: Tensor | None = None, *, attention_mask: Tensor | None = None
    ) -> list[Tensor]:
        """Return the token embeddings and the output of every block, before the final norm.

        Args:
            embeds: Hard or soft token embeddings (B, L, D).
            sigma: As in `forward`; None means clean time (sigma = 0).
            attention_mask: Positions that may be attended to, bool (B, L); all by default.

        Returns:
            ``n_blocks + 1`` tensors (B, L, D).
        """
        sigma = torch.zeros(len(embeds), device=embeds.device) if sigma is None else sigma
        condition = self.condition(len(embeds), sigma)
        return self._blocks(embeds, condition, attention_mask)

    def _blocks(self, embeds: Tensor, condition: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
        cos, sin = self.rotary_emb(embeds.shape[1])
        hidden = [embeds]
        for block in self.blocks:
            hidden.append(block(hidden[-1], condition, cos, sin, attention_mask))
        return hidden

    def condition(self, rows: int, sigma: Tensor | None) -> Tensor:
        """Return the conditioning vector (B, C); sigma is replaced by zeros without time conditioning."""
        weight = self.output_layer.linear.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if not self.config.time_conditioning:
            sigma = torch.zeros(rows, device=weight.device, dtype=dtype)
        if sigma is None or sigma.shape != (rows,):
            raise fail(
                f"sigma must have shape (B,) = ({rows},): one noise level -log(alpha_t) for each row.",
                "Pass process.sigma(t), not the time t itself, and not one value for each position.",
                sigma=sigma,
            )
        return self.sigma_map(sigma.to(weight.device, dtype))
