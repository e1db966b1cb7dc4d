"""Train PyTorch models that do not fit on the GPU, and know beforehand what that will cost."""

__version__ = "0.1.0"
