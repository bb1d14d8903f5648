"""What the processes of a run share: the accelerator, values of the main process, and the signal to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch

from tokendrift._checks import check_device, fail
from tokendrift.errors import TokenDriftError

T = TypeVar("T")


def make_accelerator(device: str = "auto") -> Any:
    """Return an accelerator for what this process was launched as: alone, DDP or FSDP.

    Args:
        device: ``"auto"`` for the device that Accelerate chooses, or a device for a process that was launched alone.

    Raises:
        TokenDriftError: If this machine does not have the device, or Accelerate is missing.
    """
    if device != "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise fail(
            "device was given, but several processes were launched, which need a device each.",
            "Leave it out: Accelerate chooses the devices.",
            device=device,
        )
    chosen = {} if device == "auto" else {"ACCELERATE_TORCH_DEVICE": str(check_device(device))}
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.utils import patch_environment
    except ImportError as error:
        raise fail(
            f"{error}; it is needed for refinement.", "Install it with pip install 'tokendrift[train]'."
        ) from None
    # The other processes wait while the main one measures samples, which may take longer than the usual limit.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=4))
    # Optimization runs autocast itself: that of accelerate would widen the logits, the largest tensor, to float32.
    with patch_environment(**chosen):
        return Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[patience])


def check_accelerator(accelerator: Any) -> None:
    """Require an accelerator that trains alone, by DDP or by FSDP2, and leaves precision and accumulation to the run.

    Raises:
        TokenDriftError: For FSDP of version 1, DeepSpeed and all others, and for an accelerator that accumulates
            gradients itself or has mixed precision.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    sharded = kind == "FSDP" and getattr(accelerator, "is_fsdp2", False)  # accelerate before 1.6 has no FSDP2
    if kind != "NO" and not kind.startswith("MULTI_") and not sharded:
        raise fail(
            f"training with several processes requires DDP or FSDP2, but accelerate was launched for {kind}"
            f"{' of version 1' if kind == 'FSDP' else ''}.",
            "Launch with --use_fsdp --fsdp_version 2 to shard weights, or with --multi_gpu.",
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise fail(
            "gradient_accumulation_steps of accelerate must be 1: gradients would be divided by it again.",
            "Leave it out and set micro_batch: gradients are accumulated over the micro-batches of each batch_size.",
            gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
        )
    if accelerator.mixed_precision != "no":
        raise fail(
            "mixed_precision of accelerate must be 'no': it would act beside the setting precision.",
            "Leave it out, and set precision to 'bf16' for a network under autocast.",
            mixed_precision=accelerator.mixed_precision,
        )


def any_rank(accelerator: Any, *here: bool) -> list[bool]:
    """Return for each statement whether it is true on at least one process; every process must call."""
    if accelerator.num_processes == 1:
        return list(here)
    found = accelerator.reduce(torch.tensor(here, dtype=torch.float32, device=accelerator.device), "sum")
    return [bool(count) for count in found.tolist()]


def broadcast_from_main(accelerator: Any, value: Any) -> Any:
    """Send a value from the main process to all processes, and return it; every process must call."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def done_by_main(accelerator: Any, work: Callable[[], T]) -> T:
    """Do some work on the main process; return its result on all processes, or raise its error on all.

    Every process must call.
    """
    result: T | None = None
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = work()
        except Exception as found:
            error = found
    result, message = broadcast_from_main(accelerator, (result, None if error is None else str(error)))
    if message is not None:
        raise error or TokenDriftError(message)
    return cast(T, result)


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM and SIGINT inside the block, and yield a function that returns whether one has come.

    Clusters send SIGTERM before they kill a process, and Ctrl-C sends SIGINT; a second SIGINT raises KeyboardInterrupt
    at once. A signal that is ignored stays ignored. Outside the main thread signals cannot be caught, and the function
    always returns False.
    """
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
