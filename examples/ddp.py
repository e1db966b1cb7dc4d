"""DistributedDataParallel with offload: wrap the model first, then hand it to DDP.

torchrun --nproc-per-node 2 examples/ddp.py          two GPUs, or two processes on the CPU
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vdnn

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank = dist.get_rank()
place = torch.device("cuda", rank) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(place)

torch.manual_seed(0)
model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.GELU())], nn.Linear(128, 10))
model.to(place)
# the same, without offload: to show that the numbers are equal
plain = DistributedDataParallel(copy.deepcopy(model))
vdnn.wrap(model, "vdnn-all", device=None if cuda else vdnn.VirtualDevice(), min_bytes=1024, keep_soon=False)
parallel = DistributedDataParallel(model)

optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (parallel, plain)]
for step in range(3):
    torch.manual_seed(100 * step + rank)  # each rank has its own batch
    x, y = torch.randn(64, 128, device=place), torch.randint(0, 10, (64,), device=place)
    losses = []
    for trained, optimizer in zip((parallel, plain), optimizers, strict=True):
        loss = nn.functional.cross_entropy(trained(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"rank {rank}, step {step}: loss {losses[0]:.6f}")
    assert losses[0] == losses[1]
assert all(torch.equal(a, b) for a, b in zip(parallel.parameters(), plain.parameters(), strict=True))
assert vdnn.report(model).offloaded_bytes > 0
print(f"rank {rank}: equal to training without offload")
dist.destroy_process_group()
