"""Encoders behind feature maps: one protocol, an adapter for transformers, input embeddings, other vocabularies."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from tokendrift._checks import INTEGER_DTYPES, check_choice, check_floating, check_tensor, fail


@runtime_checkable
class HiddenStates(Protocol):
    """An encoder that shows the output of every layer, as `tokendrift.models.DiT` does."""

    def hidden_states(self, embeds: Tensor, *, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Map embeddings (B, L, D) to a list of (B, L, D), input first.

        Positions where ``attention_mask`` (bool, (B, L)) is false are not attended to; their own rows can have any
        finite values. An encoder that is conditioned on the noise level takes ``sigma``, (B,), too.
        """
        ...


class InputsEmbedsEncoder(nn.Module):
    """Hidden states of a model that takes ``inputs_embeds``: the encoders and causal models of transformers.

    The model's forward must accept ``inputs_embeds``, ``attention_mask`` and ``output_hidden_states`` and return an
    object with ``hidden_states``. Heads are not used: for a model for language modelling or classification, its
    ``base_model`` is called. The model determines the content of the list: BERT's first entry is its normalised sum of
    word and position embeddings, and the last entry of GPT-2 and Llama follows the final norm.

    Rows are shifted to the left before the model is called and shifted back afterwards, so that the first real token
    always has the first position, on whichever side the padding is and however the model numbers positions.

    Args:
        model: The model; neither copied nor changed.

    Raises:
        TokenDriftError: If the model takes no ``inputs_embeds`` or wants input for a decoder too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        base = getattr(model, "base_model", None)
        self.model = base if isinstance(base, nn.Module) and "inputs_embeds" in _arguments(base) else model
        arguments = _arguments(self.model)
        if "inputs_embeds" not in arguments:
            raise fail("the model's forward must accept inputs_embeds.", model=type(model).__name__)
        if "decoder_input_ids" in arguments:
            raise fail(
                "a feature map has no input for the decoder of an encoder-decoder model.",
                "Pass the encoder alone: model.get_encoder().",
                encoder=type(model).__name__,
            )
        self._options = {"use_cache": False} if "use_cache" in arguments else {}

    def __getstate__(self) -> dict[str, Any]:
        # transformers 5 hooks into the layers at the first call that asks for hidden states, with functions that
        # cannot be pickled; where the mark is missing it does so again.
        for module in self.model.modules():
            module.__dict__.pop("_output_capturing_hooks_installed", None)
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                    del module._forward_hooks[key]
        return self.__dict__

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's word embeddings."""
        words: Any = self.model
        return words.get_input_embeddings()

    def hidden_states(self, embeds: Tensor, *, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Return the hidden states of the model, a list of (B, L, D').

        Raises:
            TokenDriftError: If L is more than the model's ``max_position_embeddings``, or it shows no hidden states.
        """
        self._check_length(embeds)
        if attention_mask is None:
            return self._run(embeds, None)
        # A stable sort: real positions first, in their order.
        order = attention_mask.logical_not().int().argsort(dim=1, stable=True)
        mask = attention_mask.gather(1, order).long()
        mask[:, 0] = 1  # a row of padding alone attends to something, which keeps it finite
        back = order.argsort(dim=1)
        return [_take(hidden, back) for hidden in self._run(_take(embeds, order), mask)]

    def _run(self, embeds: Tensor, mask: Tensor | None) -> list[Tensor]:
        out = self.model(
            inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True, return_dict=True, **self._options
        )
        hidden = getattr(out, "hidden_states", None)
        if hidden is None:
            raise fail(
                "the encoder returned no hidden_states although output_hidden_states=True was passed.",
                "Wrap it in a module with hidden_states(embeds, attention_mask=...) -> list of (B, L, D).",
                encoder=type(self.model).__name__,
            )
        return list(hidden)

    def _check_length(self, embeds: Tensor) -> None:
        longest = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < embeds.shape[1]:
            raise fail(
                f"the encoder accepts at most {longest} positions (max_position_embeddings), but L is "
                f"{embeds.shape[1]}.",
                "Train on shorter sequences, or use an encoder that accepts longer ones.",
                embeds=embeds,
            )


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile`` or peft has wrapped, adapters included; any other module as it is."""
    inner: Any = module
    while True:
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif hasattr(inner, "peft_config") and callable(getattr(inner, "get_base_model", None)):
            inner = inner.get_base_model()
        else:
            return cast(nn.Module, inner)


def as_encoder(module: nn.Module) -> nn.Module:
    """Return the module as one with ``hidden_states``: itself, or in an `InputsEmbedsEncoder`.

    A module that ``torch.compile``, peft or `tokendrift.models.MaskedLMDenoiser` has wrapped is taken out of its
    wrapper first.

    Raises:
        TokenDriftError: If it is neither, or wrapped for training on several devices.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in module.parameters()):
        raise fail(
            "encoder is sharded: its parameters are DTensors, which cannot be copied into a frozen encoder.",
            "Build the loss or the feature map from the model before fully_shard.",
            encoder=type(module).__name__,
        )
    module = unwrapped(module)
    module = unwrapped(getattr(module, "adapted", module))
    if callable(getattr(module, "hidden_states", None)):
        return module
    if "inputs_embeds" in _arguments(module):
        return InputsEmbedsEncoder(module)
    wrapped = isinstance(getattr(module, "module", None), nn.Module)
    raise fail(
        "encoder must have a method hidden_states(embeds, attention_mask=...) -> list of (B, L, D), or be a model of "
        "transformers whose forward takes inputs_embeds. TokenDriftLoss.from_encoder needs its input embedding too: "
        "vocab_embed.embedding, (V, D), or get_input_embeddings().",
        "Pass the model inside the wrapper: encoder.module."
        if wrapped
        else "Add what is missing to your model, or build the loss from parts: TokenDriftLoss(embedding, feature_map) "
        "takes any matrix (V, D) and any frozen callable (B, L, D) -> (B, M).",
        encoder=type(module).__name__,
    )


def input_embedding(encoder: nn.Module) -> Tensor:
    """Return E, (V, D): what the encoder feeds into its first layer for each id; without gradient.

    The result shares the memory of the encoder's parameter if the embedding is that parameter. Some models scale their
    embeddings on the way (BART, Gemma 3); for these the result is a new matrix that includes the scale.

    Raises:
        TokenDriftError: If the encoder has neither ``vocab_embed.embedding`` nor ``get_input_embeddings()``.
    """
    source: Any = encoder
    if hasattr(source, "vocab_embed"):
        return source.vocab_embed.embedding.detach()
    if not hasattr(source, "get_input_embeddings"):
        raise fail(
            "encoder has no input embedding (vocab_embed.embedding or get_input_embeddings()).",
            "Pass the parts: TokenDriftLoss(embedding, feature_map).",
            encoder=type(encoder).__name__,
        )
    words = source.get_input_embeddings()
    weight = words.weight.detach()
    if type(words) is nn.Embedding:
        return weight
    with torch.no_grad():
        table = words(torch.arange(len(weight), device=weight.device))
    return weight if torch.equal(table, weight) else table


def map_vocabulary(
    embedding: Tensor, ids: Tensor | Sequence[int], *, missing: Literal["mean", "zero"] = "mean"
) -> Tensor:
    """Return the embedding of an encoder in the order of another vocabulary, (V', D).

    For an encoder whose vocabulary differs from the denoiser's: a row for each entry of the denoiser, in its order. An
    entry that the encoder does not have, such as the mask of a masked model, has id -1. The row of such an entry
    matters only if the entry can have probability or occur in the text, which is never the case for ``mask_id``.

    Args:
        embedding: E of the encoder, (V, D).
        ids: For each of the V' entries of the denoiser's vocabulary the encoder's id of the same token, or -1.
        missing: Row of entries with id -1: ``"mean"`` for the mean of all rows of E, or ``"zero"``.

    Raises:
        TokenDriftError: If an id lies outside the encoder's vocabulary, or no entry has a counterpart.

    >>> embedding = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    >>> map_vocabulary(embedding, [1, 0, -1])
    tensor([[2., 3.],
            [0., 1.],
            [1., 2.]])
    """
    check_floating("embedding", check_tensor("embedding", embedding, ("V", "D")))
    check_choice("missing", missing, ("mean", "zero"))
    index = check_tensor("ids", ids if isinstance(ids, Tensor) else torch.tensor(ids), ("V'",)).to(embedding.device)
    if index.dtype not in INTEGER_DTYPES:
        raise fail("ids must be integers: the encoder's id of each entry of the denoiser, -1 for none.", ids=index)
    index, size = index.long(), len(embedding)
    if index.min() < -1 or index.max() >= size:
        raise fail(
            f"ids go from {int(index.min())} to {int(index.max())}, but the encoder's vocabulary V has {size} entries "
            f"(0 to {size - 1}; -1 for none).",
            "Give for each entry of the denoiser's vocabulary the encoder's id of the same token.",
            ids=index,
            embedding=embedding,
        )
    if index.max() < 0:
        raise fail("no entry of the denoiser's vocabulary has a counterpart: all ids are -1.", ids=index)
    embedding = embedding.detach()
    wide = torch.promote_types(embedding.dtype, torch.float32)
    absent = embedding.mean(dim=0, dtype=wide) if missing == "mean" else embedding.new_zeros(embedding.shape[1])
    return torch.where(index[:, None] >= 0, embedding[index.clamp_min(0)], absent.to(embedding.dtype))


def _take(rows: Tensor, order: Tensor) -> Tensor:
    """Return rows (B, L, D) with the positions of each in another order, (B, L)."""
    return rows.gather(1, order[..., None].expand_as(rows))


def _arguments(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(module.forward).parameters)
