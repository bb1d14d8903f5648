"""Devices on which averages, checkpoints and gradients would be wrong are refused."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from accelerate import DistributedType

from tokendrift import TokenDriftError
from tokendrift.training import processes
from tokendrift.training.processes import check_accelerator, done_by_main, make_accelerator


def accelerator(kind, *, fsdp2=False, accumulation=1, precision="no"):
    options = {"is_fsdp2": fsdp2, "gradient_accumulation_steps": accumulation, "mixed_precision": precision}
    return SimpleNamespace(distributed_type=kind, **options)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_alone_and_ddp_are_fine(kind):
    check_accelerator(accelerator(kind))


def test_fsdp2_is_fine_and_fsdp1_is_refused():
    check_accelerator(accelerator(DistributedType.FSDP, fsdp2=True))
    with pytest.raises(TokenDriftError, match=r"(?s)launched for FSDP of version 1.*--fsdp_version 2"):
        check_accelerator(accelerator(DistributedType.FSDP))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA])
def test_what_shards_in_other_ways_is_refused(kind):
    with pytest.raises(TokenDriftError, match=rf"(?s)launched for {kind.value}\..*--fsdp_version 2"):
        check_accelerator(accelerator(kind))


def test_a_device_is_chosen_for_this_call_alone(monkeypatch):
    before = dict(os.environ)
    assert make_accelerator("cpu").device.type == "cpu"
    assert dict(os.environ) == before
    with pytest.raises(TokenDriftError, match="device 'abacus' cannot be used"):
        make_accelerator("abacus")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TokenDriftError, match="several processes were launched"):
        make_accelerator("cpu")


def test_an_accelerator_that_divides_gradients_is_refused():
    with pytest.raises(TokenDriftError, match=r"(?s)gradient_accumulation_steps of accelerate must be 1.*micro_batch"):
        check_accelerator(accelerator(DistributedType.NO, accumulation=8))


def test_an_accelerator_with_a_precision_of_its_own_is_refused():
    with pytest.raises(TokenDriftError, match=r"(?s)mixed_precision of accelerate must be 'no'.*set precision to"):
        check_accelerator(accelerator(DistributedType.NO, precision="bf16"))


@pytest.mark.parametrize("error", [TokenDriftError("the run is another one"), PermissionError("no permission")])
def test_whatever_fails_on_the_main_process_is_raised_on_all_of_them(monkeypatch, error):
    sent = []
    monkeypatch.setattr(processes, "broadcast_from_main", lambda _, value: sent.append(value) or value)

    def work():
        raise error

    with pytest.raises(type(error)) as caught:
        done_by_main(SimpleNamespace(is_main_process=True), work)
    assert caught.value is error and sent == [(None, str(error))]
    monkeypatch.setattr(processes, "broadcast_from_main", lambda *_: sent[0])
    with pytest.raises(TokenDriftError, match=str(error)):
        done_by_main(SimpleNamespace(is_main_process=False), work)
