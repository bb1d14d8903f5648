"""A random input for masked models: fresh numbers at every masked position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokendrift._checks import check_count, check_mask_id, fail
from tokendrift.models.layers import Embedding

if TYPE_CHECKING:
    from tokendrift.models.dit import DiT

__all__ = ["RandomMaskEmbedding", "add_random_input", "random_numbers", "without_random_input"]


class RandomMaskEmbedding(Embedding):
    r"""Token embedding in which every masked position is given K random numbers.

    .. math:: e_i = E_{m} + W^\top n_i,\qquad n_i \sim \mathcal N(0, I_K) \qquad \text{where } x_i = m

    A masked model predicts all masked positions of one input independently, and its first input, nothing but masks, is
    the same for every sample. With a random input it is a mixture over n of such independent laws, which may depend on
    each other, and its first step can give different samples different texts.

    W is learned and starts at the size of the mask's embedding: the expected squared norm of :math:`W^\top n` is that
    of :math:`E_m`. Other positions, and inputs that are no ids, are embedded as by `Embedding`, whose parameter
    ``embedding`` keeps its name.

    Args:
        vocab_size: V.
        width: D.
        mask_id: Id of the mask, m.
        numbers: K, numbers a position, at least 1.

    Attributes:
        random_map: W, parameter (K, D).
        silent: Whether the numbers are left out, see `without_random_input`.

    Raises:
        TokenDriftError: For an option out of range.

    Source: D-MMD (arXiv 2603.20155) gives its masked student a second, random input; random mask embeddings are those
    of IMDM (arXiv 2605.10518).
    """

    def __init__(self, vocab_size: int, width: int, mask_id: int, numbers: int) -> None:
        super().__init__(vocab_size, width)
        check_mask_id(mask_id, vocab_size)
        self.silent, self.mask_id = False, mask_id
        self.numbers = check_count("numbers", numbers, least=1)
        self.random_map = nn.Parameter(torch.empty(numbers, width))
        self.reset_random_map()

    @torch.no_grad()
    def reset_random_map(self, generator: torch.Generator | None = None) -> None:
        """Draw W anew, of the size of the present embedding of the mask, from a generator on the CPU."""
        size = self.embedding[self.mask_id].norm() / self.random_map.numel() ** 0.5
        self.random_map.copy_(torch.randn(self.random_map.shape, generator=generator)).mul_(size)

    def forward(
        self, ids: Tensor, embed: Callable[[Tensor], Tensor] | None = None, normals: Tensor | None = None
    ) -> Tensor:
        """Embed.

        Args:
            ids: Ids (B, L).
            embed: As in `Embedding`: what it returns is given no random numbers.
            normals: Standard normal numbers n, floating point (B, L, K). Default: drawn from PyTorch's global
                generator.

        Returns:
            Shape (B, L, D).

        Raises:
            TokenDriftError: If normals have another shape.
        """
        found = super().forward(ids, embed)
        if embed is not None or self.silent:
            return found
        if normals is None:
            normals = torch.randn(*ids.shape, self.numbers, device=ids.device)
        elif normals.shape != (*ids.shape, self.numbers):
            raise fail(f"normals must have shape (B, L, K) = {(*ids.shape, self.numbers)}.", normals=normals)
        moved = normals.to(self.random_map.dtype) @ self.random_map
        return found + moved.masked_fill((ids != self.mask_id)[..., None], 0).to(found.dtype)


def add_random_input(model: DiT, numbers: int, *, generator: torch.Generator | None = None) -> None:
    """Give a model a random input, in place, as if it had been built with ``random_input=numbers``.

    The embedding matrix stays the parameter that it was; what the model predicts changes, since W does not start at
    zero.

    Args:
        model: A masked model without random input.
        numbers: K, numbers a masked position.
        generator: Source of W, on the CPU. Default: PyTorch's global generator.

    Raises:
        TokenDriftError: If the model has no mask, or has a random input already.
    """
    config = dataclasses.replace(model.config, random_input=check_count("numbers", numbers, least=1))
    before = model.vocab_embed
    if isinstance(before, RandomMaskEmbedding) or config.mask_id is None:
        raise fail(
            f"the model has a random input of {random_numbers(model)} numbers already.",
            "Leave random_input out: the model keeps the one that it has.",
            numbers=numbers,
        )
    after = RandomMaskEmbedding(config.vocab_size, config.hidden_dim, config.mask_id, numbers).to(before.embedding)
    after.embedding = before.embedding
    after.reset_random_map(generator)
    model.config, model.vocab_embed = config, after.train(before.training)


def random_numbers(model: object) -> int:
    """Return K, how many random numbers a model takes at each masked position; 0 for a model without random input.

    Wrappers such as DDP or autocast are looked through.
    """
    return next((module.numbers for module in _embeddings(model)), 0)


@contextmanager
def without_random_input(model: nn.Module) -> Iterator[None]:
    """Leave the random numbers out inside the block, so that a model predicts what it did before it was given them."""
    modules = [module for module in _embeddings(model) if not module.silent]
    for module in modules:
        module.silent = True
    try:
        yield
    finally:
        for module in modules:
            module.silent = False


def _embeddings(model: object) -> list[RandomMaskEmbedding]:
    modules = model.modules() if isinstance(model, nn.Module) else iter(())
    return [module for module in modules if isinstance(module, RandomMaskEmbedding)]
