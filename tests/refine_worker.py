"""A small refinement, for tests that kill it or run it on several processes."""

from __future__ import annotations

import os
import random
import signal
import time

import accelerate
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401 - so that forked children need not

from tokendrift.demo import PRETRAINED
from tokendrift.models import DiT, DiTConfig, save_denoiser
from tokendrift.models.checkpoints import process_of
from tokendrift.training import make_config, refine

TEXT = "the drift of a token pulls it to real text and away from what the model says of it at every step"
LENGTH = 12


def make_inputs(folder, *, masked=True):
    """Write a tiny checkpoint and a text."""
    folder.mkdir(parents=True, exist_ok=True)
    size, mask = (1025, 1024) if masked else (1024, None)
    sizes = {"hidden_dim": 16, "cond_dim": 4, "n_blocks": 1, "n_heads": 2, "dropout": 0.1}
    config = DiTConfig(size, LENGTH, mask_id=mask, time_conditioning=not masked, **sizes)
    model, generator = DiT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_denoiser(model, folder / "base", process_of(config))
    draw = random.Random(1)
    lines = [" ".join(draw.choices(TEXT.split(), k=9)) for _ in range(80)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")


def config(folder, **changes):
    """Return the configuration of a short run on them."""
    values = {
        "checkpoint": str(folder / "base"), "output": str(folder / "run"), "text": (str(folder / "text.txt"),),
        "documents": "line", "tokenizer": str(PRETRAINED / "tokenizer.json"), "shuffle": 32, "steps": 6,
        "batch_size": 8, "micro_batch": 4, "queue_size": 24, "learning_rate": 1e-2, "warmup": 2, "ema": 0.9,
        "checkpoint_every": 2, "evaluate_samples": 4, "evaluate_nfe": (2,), "log_every": 1, "tensorboard": False,
    }  # fmt: skip
    return make_config(values={**values, **changes})


def fork(work):
    """Run some work in a forked child; return its process id. This process has run nothing that a fork would break."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def wait(child):
    """Wait for a child that has to end well."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise SystemExit(f"a child ended with {code}")


def kill(folder, kills, seed, **changes):
    """Refine undisturbed into ``whole``, then with kills at random moments of start, steps, evaluations and checkpoints
    into ``killed``; return the number of kills.
    """
    wait(fork(lambda: make_inputs(folder)))
    made = config(folder, steps=8 * kills, evaluate_every=3, **changes)
    wait(fork(lambda: refine(made.replace(output=str(folder / "whole")), progress=False)))
    draw, done, killed = random.Random(seed), 0, made.replace(output=str(folder / "killed"))
    while done < kills:
        reader, writer = os.pipe()
        child = fork(lambda out=writer: refine(killed, progress=False, on_step=lambda step: os.write(out, b"x")))
        os.close(writer)
        for _ in range(draw.randint(0, 12)):  # steps that it may take; none is a kill while it starts
            os.read(reader, 1)
        time.sleep(draw.uniform(0, 0.05))
        os.close(reader)
        if os.waitpid(child, os.WNOHANG)[0]:
            break  # it was through before its time
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += 1
    wait(fork(lambda: refine(killed, progress=False)))
    return done


class Sharding(accelerate.Accelerator):
    """What accelerate does for FSDP2 on accelerators; on CPUs it offers DDP alone."""

    def prepare(self, model, optimizer):
        """Shard the model in place and hand its new parameters to the optimiser."""
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        return model, optimizer


def rank(environment, mode, folder, changes):
    """Refine as one process of several, by FSDP2 where the mode is ``"shard"``; return the number of evaluations."""
    os.environ.update(environment)
    sharding = Sharding(cpu=True) if mode == "shard" else None
    return len(refine(config(folder, **changes), accelerator=sharding, progress=False).evaluations)
