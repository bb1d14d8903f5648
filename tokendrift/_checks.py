"""Input rules, one function each. A message names the argument, what was expected, what was given, and what to do."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokendrift.errors import TokenDriftError, UnknownOptionError

F = TypeVar("F", bound=Callable[..., Any])
TYPES = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}  # of values, in messages
# Packages of the frames that can stand between a warning and the line of the user.
BETWEEN = frozenset({"tokendrift", "torch", "accelerate", "transformers", "typer", "click", "contextlib"})
LARGEST = 2**63 - 1  # integer that PyTorch can hold
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def describe(value: object) -> str:
    """Return shape, dtype and device of a tensor, or the type of anything else."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{tuple(value.shape)} {dtype} {value.device.type}"
    try:
        return " ".join(f"{type(value).__name__} {value!r}".splitlines())[:120]
    except ValueError:  # an integer of more digits than Python writes
        return type(value).__name__


def fail(message: str, remedy: str = "", /, **got: object) -> TokenDriftError:
    """Build an error. Its second line shows the values that were given, and its third line says what to do."""
    lines = [message]
    if got:
        lines.append("  got " + ", ".join(f"{name} {describe(value)}" for name, value in got.items()))
    if remedy:
        lines.append("  " + remedy)
    return TokenDriftError("\n".join(lines))


def warn_user(message: str) -> None:
    """Issue a warning at the line of the user: the innermost one outside this package and the libraries above."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def can_be_read(values: Tensor) -> bool:
    """Return whether values can be looked at here: an accelerator would have to be waited for, a graph has none."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_options(function: F) -> F:
    """Decorate a function so that an unknown keyword argument raises an error that suggests the nearest option.

    Type checkers and `inspect.signature` see the signature of the function itself.

    Raises:
        UnknownOptionError: At a call with a keyword that the function does not have.
    """
    parameters = inspect.signature(function).parameters
    options = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() - parameters.keys():
            # The class that was called: an inherited constructor speaks for the class that inherits it.
            owner = args[0] if isinstance(args[0], type) else type(args[0])
            label = owner.__name__ + ("" if function.__name__ == "__init__" else f".{function.__name__}")
            question = nearest(name, options)
            raise UnknownOptionError(
                f"{label} has no option {name!r}.\n  got {name} {describe(kwargs[name])}\n  "
                + (f"{question} " if question else "")
                + f"The options are {', '.join(options)}."
            )
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def check_tensor(name: str, value: object, symbols: Sequence[str]) -> Tensor:
    """Require a tensor with one axis for each symbol, none of them empty."""
    shape = f"({', '.join(symbols)}{',' if len(symbols) == 1 else ''})"
    if not isinstance(value, Tensor):
        remedy = f"Pass {name} as torch.Tensor."
        if isinstance(getattr(value, "logits", None), Tensor):
            remedy = "It is the output of a model of transformers: pass its .logits, or wrap the model in a "
            remedy += "tokendrift.models.MaskedLMDenoiser."
        raise fail(f"{name} must be a tensor of shape {shape}.", remedy, **{name: value})
    if value.ndim != len(symbols):
        raise fail(
            f"{name} must have shape {shape}, but it has {value.ndim} axes.",
            f"Reshape {name}; a single sequence still needs its batch axis.",
            **{name: value},
        )
    for axis, symbol in enumerate(symbols):
        if value.shape[axis] == 0:
            raise fail(f"{name} is empty: {symbol} is 0.", "Skip empty batches before the call.", **{name: value})
    return value


def check_logits(name: str, logits: object, shape: tuple[int, ...]) -> Tensor:
    """Require that what a network returned, by this name, are logits (B, L, V), or (K, V) at K positions."""
    symbols = ("B", "L", "V") if len(shape) == 3 else ("K", "V")
    found = check_tensor(name, logits, symbols)
    if found.shape != shape:
        raise fail(
            f"{name} must return logits ({', '.join(symbols)}) = {shape}.",
            "Pass the vocabulary size that it returns, to the process too; wrap a network that shifts or crops its "
            "output.",
            logits=found,
        )
    return found


def check_denoiser(denoiser: object) -> None:
    """Require that a denoiser is not a bare model of transformers, which would take sigma for an attention mask."""
    if not isinstance(denoiser, nn.Module) or torch.compiler.is_compiling():
        return
    arguments = inspect.signature(denoiser.forward).parameters
    if "input_ids" in arguments and "attention_mask" in arguments and "sigma" not in arguments:
        raise fail(
            "denoiser must map ids (B, L) and sigma (B,) to logits (B, L, V), but it is a model of transformers.",
            "Wrap it: tokendrift.models.MaskedLMDenoiser(model, mask_id=...).",
            denoiser=type(denoiser).__name__,
        )


@contextmanager
def check_takes(argument: str, remedy: str, *, called: str = "the denoiser") -> Iterator[None]:
    """Require that what is called in the block takes a keyword argument; the remedy says what to do if not."""
    try:
        yield
    except TypeError as error:
        if f"unexpected keyword argument '{argument}'" not in str(error):
            raise
        raise fail(f"{called} must take the keyword argument {argument}: {error}.", remedy) from None


def check_floating(name: str, value: Tensor) -> None:
    """Require a floating-point dtype."""
    if not value.is_floating_point():
        raise fail(f"{name} must be floating point.", f"Convert it with {name}.float().", **{name: value})


def check_ids(name: str, value: object, vocab_size: int, like: Tensor | None = None) -> Tensor:
    """Require token ids (B, L) of an integer dtype, within the vocabulary, of the shape of ``like``.

    The range is checked on the CPU only. On an accelerator, the embedding look-up reports it without synchronisation.
    """
    ids = check_tensor(name, value, ("B", "L"))
    if ids.dtype not in INTEGER_DTYPES:
        raise fail(f"{name} must hold integer token ids.", f"Convert it with {name}.long().", **{name: value})
    if like is not None and ids.shape != like.shape[:2]:
        raise fail(
            f"{name} must have shape (B, L) = {tuple(like.shape[:2])}, that of the logits.",
            "Cut both to the same positions.",
            **{name: ids, "logits": like},
        )
    if can_be_read(ids):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise fail(
                f"{name} has ids from {low} to {high}, but the vocabulary V has {vocab_size} entries (0 to "
                f"{vocab_size - 1}).",
                "Check that tokenizer, embedding and logits belong to the same vocabulary; labels of -100 are not "
                "ids: pass them as attention_mask == 0.",
                **{name: ids},
            )
    return ids


def check_mask(name: str, value: object, shape: torch.Size) -> Tensor:
    """Require a boolean (or 0/1 integer) mask (B, L)."""
    mask = check_tensor(name, value, ("B", "L"))
    if mask.shape != shape:
        raise fail(
            f"{name} must have shape (B, L) = {tuple(shape)}.", f"Build {name} from the same batch.", **{name: mask}
        )
    if mask.is_floating_point():
        raise fail(f"{name} must be boolean.", f"Convert it with {name}.bool().", **{name: mask})
    return mask.bool()


def check_corrupted(
    noisy_ids: object, predicted: object, *, mask_id: int | None, vocab_size: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Require ids x_t and predicted positions that go together; by default the positions of the mask are predicted."""
    if noisy_ids is None and predicted is None:
        return None, None
    if noisy_ids is None:
        raise fail(
            "predicted was given without noisy_ids, so the ids at the other positions are unknown.",
            "Pass noisy_ids=x_t, or leave predicted out: every position is predicted then.",
        )
    ids = check_ids("noisy_ids", noisy_ids, vocab_size, like=like)
    if predicted is not None:
        return ids, check_mask("predicted", predicted, like.shape[:2])
    # In int64: compared with a narrow dtype, an id would wrap around.
    return ids, None if mask_id is None else ids.long() == mask_id


def check_same_device(reference_name: str, reference: Tensor, **others: object) -> None:
    """Require all tensors on one device; that a value is a tensor is for other rules to say."""
    for name, value in others.items():
        if isinstance(value, Tensor) and value.device != reference.device:
            raise fail(
                f"{name} is on {value.device} but {reference_name} is on {reference.device}.",
                f"Move it with {name}.to({reference_name}.device), or move the loss with loss.to(device).",
                **{name: value, reference_name: reference},
            )


def check_device(device: torch.device | str) -> torch.device:
    """Require a device that PyTorch supports and this machine has."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise fail(f"device {str(device)!r} cannot be used: {reason}", "Pass a device of this machine.") from None


def check_times(t: object, rows: int) -> Tensor:
    """Require times in [0, 1], one for each row; the range is read on the CPU only."""
    times = check_tensor("t", t, ("B",))
    if len(times) != rows:
        raise fail(f"t must have shape (B,) = ({rows},): one time for each row.", t=times)
    check_floating("t", times)
    if can_be_read(times) and not ((times >= 0) & (times <= 1)).all():
        raise fail("t must lie in [0, 1]: 0 is clean, 1 is noise.", "Pass times, not sigma or step numbers.", t=times)
    return times


def check_positive(name: str, value: float, *, symbol: str = "", or_zero: bool = False) -> float:
    """Require a finite number above zero, or of at least zero."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
    if not number or not (value or or_zero):
        least = "of at least 0" if or_zero else "above 0"
        raise fail(f"{name}{f' ({symbol})' if symbol else ''} must be a finite number {least}.", **{name: value})
    return float(value)


def check_scale(name: str, value: float, *, symbol: str) -> float:
    """Require a factor whose square is far from the limits of float32: beyond them a loss is infinite, or zero."""
    if not 1e-12 <= check_positive(name, value, symbol=symbol) <= 1e12:
        raise fail(f"{name} ({symbol}) must lie between 1e-12 and 1e12.", **{name: value})
    return float(value)


def check_count(name: str, value: int, *, least: int = 0, most: int = LARGEST) -> int:
    """Require an integer that is at least ``least`` and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise fail(f"{name} must be an integer of at least {least}.", **{name: value})
    if value > most:
        raise fail(f"{name} must be at most {most:,}.", **{name: value})
    return value


def check_flag(name: str, value: bool) -> bool:
    """Require True or False."""
    if not isinstance(value, bool):
        raise fail(f"{name} must be true or false.", **{name: value})
    return value


def check_fraction(name: str, value: float, remark: str = "", *, closed: bool = False) -> None:
    """Require a number in [0, 1), or in [0, 1] if ``closed``; the remark ends the message."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and (0 <= value < 1 or (closed and value == 1))):
        raise fail(f"{name} must lie in [0, 1{']' if closed else ')'}{remark}.", **{name: value})


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Require one of the named choices."""
    if value not in choices:
        raise fail(f"{name} must be one of {', '.join(map(repr, choices))}.", nearest(value, choices), **{name: value})


def nearest(value: object, choices: Iterable[str]) -> str:
    """Return a question that names the nearest choice, empty where none is near."""
    found = difflib.get_close_matches(str(value), list(choices), n=1)
    return f"Did you mean {found[0]!r}?" if found else ""


def check_temperatures(temperatures: Sequence[float], *, symbol: str) -> tuple[float, ...]:
    """Require at least one temperature, each a finite number above zero."""
    if not isinstance(temperatures, Sequence) or not temperatures:
        raise fail("temperatures must be a tuple of numbers above 0.", temperatures=temperatures)
    return tuple(check_positive("temperatures", temperature, symbol=symbol) for temperature in temperatures)


def check_betas(name: str, betas: Sequence[float]) -> None:
    """Require the two decay rates of the moments of AdamW."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise fail(f"{name} must be two numbers in [0, 1).", **{name: betas})


def check_clouds(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    exclude_positive: Tensor | None,
    exclude_negative: Tensor | None,
    positive_weights: Tensor | None,
    negative_weights: Tensor | None,
) -> None:
    """Require anchors (N, M), positives (P, M), negatives (Q, M), exclusions (N,) and weights that go together."""
    check_floating("anchors", check_tensor("anchors", anchors, ("N", "M")))
    check_floating("positives", check_tensor("positives", positives, ("P", "M")))
    if not isinstance(negatives, Tensor) or negatives.ndim != 2:
        raise fail("negatives must be a tensor of shape (Q, M).", negatives=negatives)
    check_floating("negatives", negatives)
    for side, symbol, cloud, index, weights in (
        ("positive", "P", positives, exclude_positive, positive_weights),
        ("negative", "Q", negatives, exclude_negative, negative_weights),
    ):
        if cloud.shape[1] != anchors.shape[1]:
            raise fail(
                f"{side}s has width M = {cloud.shape[1]} but anchors have M = {anchors.shape[1]}.",
                "Take all features from one feature map.",
                anchors=anchors,
                **{f"{side}s": cloud},
            )
        check_same_device("anchors", anchors, **{f"{side}s": cloud})
        if index is not None:
            check_exclusion(f"exclude_{side}", index, anchors, cloud, symbol)
        if weights is not None:
            check_weights(f"{side}_weights", weights, anchors, cloud, symbol)


def check_exclusion(name: str, index: Tensor, anchors: Tensor, references: Tensor, symbol: str) -> None:
    """Require indices from -1 to the last reference. The range is checked on the CPU only, to avoid synchronisation."""
    if not isinstance(index, Tensor) or index.shape != anchors.shape[:1] or index.dtype != torch.int64:
        raise fail(
            f"{name} must be int64 of shape (N,): for each anchor the index of one reference, -1 for none.",
            anchors=anchors,
            **{name: index},
        )
    check_same_device("anchors", anchors, **{name: index})
    if not can_be_read(index):
        return
    low, high = int(index.min()), int(index.max())
    if low < -1 or high >= len(references):
        raise fail(
            f"{name} has indices from {low} to {high}, but there are {symbol} = {len(references)} references (0 to "
            f"{len(references) - 1}; -1 for none).",
            "Number each side by itself: the first negative is 0, whatever the number of positives.",
            **{name: index},
        )


def check_weights(name: str, weights: Tensor, anchors: Tensor, references: Tensor, symbol: str) -> None:
    """Require one weight of zero or above for each reference; the sign is read on the CPU only."""
    if not isinstance(weights, Tensor) or weights.shape != references.shape[:1] or not weights.is_floating_point():
        raise fail(
            f"{name} must be floating point of shape ({symbol},): one weight for each reference.",
            **{name: weights, "references": references},
        )
    check_same_device("anchors", anchors, **{name: weights})
    if can_be_read(weights) and not (weights >= 0).all():
        raise fail(f"{name} must not contain negative numbers.", **{name: weights, "least": weights.min().item()})


def check_frozen(name: str, module: nn.Module) -> None:
    """Require evaluation mode and no parameter that requires grad."""
    trainable = [label for label, parameter in module.named_parameters() if parameter.requires_grad]
    if trainable or module.training:
        what = f"{len(trainable)} parameters that require grad ({trainable[0]}, ...)" if trainable else "training mode"
        raise fail(
            f"{name} must be frozen, but it has {what}.",
            f"Pass a frozen copy: copy.deepcopy({name}).eval().requires_grad_(False).",
            **{name: type(module).__name__},
        )


def check_mask_id(mask_id: int | None, vocab_size: int) -> None:
    """Require an entry of the vocabulary, or None."""
    if mask_id is None:
        return
    if isinstance(mask_id, bool) or not hasattr(mask_id, "__index__") or not 0 <= mask_id < vocab_size:
        raise fail(
            f"mask_id must lie in [0, V) with V = {vocab_size}: an id of the vocabulary, or None.", mask_id=mask_id
        )


def check_clean_ids(clean_ids: Tensor, mask_id: int, text: Tensor | None) -> None:
    """Require real text without the mask token. This reads the ids and therefore synchronises an accelerator."""
    masks = clean_ids.long() == mask_id
    if (masks if text is None else masks & text).any():
        raise fail(
            f"clean_ids contain the mask token (mask_id = {mask_id}), which real text does not have.",
            "Pass the text before corruption as clean_ids and the corrupted text as noisy_ids; if padding is written "
            "with the mask token, pass attention_mask.",
            clean_ids=clean_ids,
        )


def looks_like_probabilities(logits: Tensor, *, rows: int = 4) -> bool:
    """Return whether the first rows of logits (B, L, V) are non-negative and each sums to one."""
    some = logits.detach()[0, :rows].float()
    return bool(((some >= 0).all() & ((some.sum(dim=-1) - 1).abs() < 1e-2).all()).item())


def check_one_vocabulary(logits: Tensor, embedding: Tensor) -> None:
    """Require floating-point logits (B, L, V) with a column for every row of the embedding (V, D)."""
    check_floating("logits", check_tensor("logits", logits, ("B", "L", "V")))
    if logits.shape[-1] != embedding.shape[0]:
        raise fail(
            f"logits has {logits.shape[-1]} columns (V) but embedding has {embedding.shape[0]} rows (V).",
            "Denoiser and frozen encoder must share one vocabulary. Bring the embedding into the denoiser's with "
            "tokendrift.encoders.map_vocabulary(embedding, ids), where id -1 stands for entries that the encoder "
            "does not have, such as the mask; or remove that column from the logits.",
            logits=logits,
            embedding=embedding,
        )
