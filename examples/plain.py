"""A plain training loop, with offload. On a machine without a GPU it runs on a virtual device.

python examples/plain.py
"""

import logging

import torch
from torch import nn

import vdnn

logging.basicConfig(level=logging.INFO, format="%(message)s")  # one line says what was decided
torch.manual_seed(0)

model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.GELU())], nn.Linear(256, 10))
if torch.cuda.is_available():
    place = "cuda"
    vdnn.wrap(model.cuda(), optimizer="adamw")
else:
    place = "cpu"  # a virtual device with too little memory, so that something has to move
    vdnn.wrap(model, device=vdnn.VirtualDevice(memory="14MiB", d2h="200GB/s", h2d="200GB/s"), min_bytes=1024)

optimizer = torch.optim.AdamW(model.parameters())
x = torch.randn(512, 256, device=place)
y = torch.randint(0, 10, (512,), device=place)
for step in range(5):
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
print(vdnn.report(model))
