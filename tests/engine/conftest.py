"""One thread for all tests here: on a small shared machine, many threads for tiny kernels cost ten times more."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
