"""FSDP2 (`fully_shard`) with offload: shard the model first, then wrap it.

torchrun --nproc-per-node 2 examples/fsdp2.py        two GPUs, or two processes on the CPU
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import vdnn

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank = dist.get_rank()
place = torch.device("cuda", rank) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(place)
mesh = init_device_mesh(place.type, (dist.get_world_size(),))


def sharded(model: nn.Module) -> nn.Module:
    """Each layer is gathered when it runs; FSDP's own tensors come and go, and stay out of offload's way."""
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


torch.manual_seed(0)
model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.GELU())], nn.Linear(128, 10))
model.to(place)
plain = sharded(copy.deepcopy(model))
model = sharded(model)
vdnn.wrap(model, "vdnn-all", device=None if cuda else vdnn.VirtualDevice(), min_bytes=1024, keep_soon=False)

optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
for step in range(3):
    torch.manual_seed(100 * step + rank)  # each rank has its own batch
    x, y = torch.randn(64, 128, device=place), torch.randint(0, 10, (64,), device=place)
    losses = []
    for trained, optimizer in zip((model, plain), optimizers, strict=True):
        loss = nn.functional.cross_entropy(trained(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"rank {rank}, step {step}: loss {losses[0]:.6f}")
    assert losses[0] == losses[1]
for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
    assert torch.equal(ours.to_local(), theirs.to_local())
assert vdnn.report(model).offloaded_bytes > 0
print(f"rank {rank}: equal to training without offload")
dist.destroy_process_group()
