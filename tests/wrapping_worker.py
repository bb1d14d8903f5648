"""One rank of the tests of wrapped models, which test_wrapping.py starts."""

from __future__ import annotations

import warnings

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tokendrift import PooledFeatures, TokenDriftError, TokenDriftLoss
from tokendrift.models import DiT, DiTConfig

V, L, SPLIT = 12, 6, (3, 1)
CASES = {"model": {}, "owner": {}, "windows": {"window": 2}, "head": {}}


class Training(nn.Module):
    """A model that owns its loss, as a LightningModule does."""

    def __init__(self, model, drift, *, hold_logits):
        super().__init__()
        self.model, self.drift, self.hold_logits = model, drift, hold_logits

    def forward(self, noisy, clean, mask):
        def drifted(logits):
            return self.drift(logits, clean, noisy_ids=noisy, predicted=noisy != clean, attention_mask=mask)

        return drifted(self.model(noisy)) if self.hold_logits else self.model(noisy, head=drifted)


def sharded(module):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in module.modules():
        if isinstance(part, DiT):
            for block in part.blocks:
                fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


WRAPPERS = {"bare": lambda module: module, "ddp": nn.parallel.DistributedDataParallel}
if hasattr(torch.cpu.Stream, "record_event"):  # without it, FSDP2 runs on accelerators only
    WRAPPERS["fsdp2"] = sharded


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(rank, ranks, wrap, case):
    """Take three steps; return what a process knows at the end."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(V, L, hidden_dim=8, cond_dim=4, n_blocks=2, n_heads=2, dropout=0.0)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    drift = TokenDriftLoss.from_encoder(model, queue_size=16, **CASES[case])
    owner = Training(model, drift, hold_logits=case != "head")
    if case == "owner":
        call = WRAPPERS[wrap](owner)
    else:
        owner.model = WRAPPERS[wrap](model)
        call = owner
    encoder = [parameter.clone() for parameter in drift.feature_map.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    mine = slice(0, sum(SPLIT)) if ranks == 1 else slice(sum(SPLIT[:rank]), sum(SPLIT[: rank + 1]))
    found = {"loss": [], "gradient": []}
    for _ in range(3):
        clean = torch.randint(V, (sum(SPLIT), L))
        noisy = torch.where(torch.rand(clean.shape) < 0.7, torch.randint(V, clean.shape), clean)
        mask = None
        if case == "windows":
            mask = torch.arange(L) < torch.tensor([6, 2, 4, 3])[:, None]
        loss = call(noisy[mine], clean[mine], None if mask is None else mask[mine])
        optimizer.zero_grad()
        loss.backward()
        found["loss"].append(loss.detach())
        found["gradient"].append(torch.cat([whole(p.grad).flatten() for p in model.parameters()]).clone())
        optimizer.step()
    found = {key: torch.stack(values) for key, values in found.items()}
    found["parameters"] = torch.cat([whole(p.detach()).flatten() for p in model.parameters()])
    found["queues"] = (drift.queue_real.features(), drift.queue_generated.features())
    found["names"] = sorted(name for name, _ in call.named_parameters())
    found["stored"] = sorted(call.state_dict())
    found["frozen"] = all(torch.equal(a, b) for a, b in zip(encoder, drift.feature_map.parameters(), strict=True))
    if wrap != "bare":
        try:
            PooledFeatures(owner.model if case != "owner" else call)
        except TokenDriftError as error:
            found["error"] = str(error)
    return found


def main(rank, ranks, store):
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # says how not to use its output; we do not
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    wraps = ["bare"] if ranks == 1 else [name for name in WRAPPERS if name != "bare"]
    found = {(wrap, case): train(rank, ranks, wrap, case) for wrap in wraps for case in CASES}
    if ranks > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    return found
