"""The Triton kernels give what PyTorch's operators give: on a CPU in Triton's interpreter, on a GPU as they are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tokendrift import _lift_ops, _row_kernels, soft_token_lift

triton = pytest.importorskip("triton")
VOCAB, TOKENS = 4100, 20  # a row of more than one block
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process in which they are interpreted")
def test_the_kernels_are_right_in_the_interpreter():
    """In a process of its own, since Triton has to be imported with the variable set."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout


def batch(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(1, TOKENS, VOCAB, generator=generator)).to(dtype)
    logits[0, 3, :4099] = -torch.inf  # the first block of this row is closed
    table = 0.1 * torch.randn(VOCAB, 6, generator=generator)
    ids = torch.randint(VOCAB, (1, TOKENS), generator=generator)
    return logits, table, ids, torch.rand(1, TOKENS, generator=generator) < 0.6


def lifted(dtype, table_dtype, *, partly, mask_id):
    """Return a lift and its gradients."""
    logits, table, ids, predicted = batch(dtype)
    logits.requires_grad_()
    table = table.to(table_dtype).requires_grad_()
    options = {"noisy_ids": ids, "predicted": predicted} if partly else {}
    out = soft_token_lift(logits, table, mask_id=mask_id, **options)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return out.detach(), logits.grad, table.grad


@interpreted
@pytest.mark.parametrize(
    ("dtype", "table_dtype", "partly", "mask_id"),
    [
        (torch.float32, torch.float32, False, None),
        (torch.float32, torch.float32, True, 7),
        (torch.bfloat16, torch.bfloat16, True, None),
        (torch.bfloat16, torch.float32, False, 4098),
        (torch.float16, torch.float32, True, 0),
    ],
    ids=str,
)
def test_the_lift_is_the_same_with_the_kernels(monkeypatch, dtype, table_dtype, partly, mask_id):
    options = {"partly": partly, "mask_id": mask_id}
    expected = lifted(dtype, table_dtype, **options)
    monkeypatch.setattr(_lift_ops, "_kernels", lambda rows: _row_kernels)
    found = lifted(dtype, table_dtype, **options)
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (2e-2, 2e-3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@interpreted
def test_what_is_not_finite_stays_so():
    rows = torch.zeros(4, 5)
    rows[0, 1], rows[1, 2], rows[2] = torch.nan, torch.inf, -torch.inf
    p = torch.ones(4, 5)
    _row_kernels.softmax_into(p, rows, None, 0, -1)
    torch.testing.assert_close(p, rows.softmax(dim=1), equal_nan=True)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles them")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["_softmax", "_slopes"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(name, dtype):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _row_kernels.load()
    kernel = getattr(_row_kernels, name)
    kinds = {"out": f"*{dtype}", "slopes": f"*{dtype}", "rows": f"*{dtype}", "index": "*i64", "BLOCK": "constexpr"}
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, {"BLOCK": _row_kernels.BLOCK})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": _row_kernels.WARPS}).asm[
        "ptx"
    ]


def test_a_failure_of_the_compiler_costs_a_warning(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(_row_kernels, "softmax_into", fail)
    with pytest.warns(UserWarning, match="do not run here.*no compiler"):
        assert not _lift_ops._kernels_work.__wrapped__(torch.device("cpu"))
