"""The CUDA caching allocator as a model: addresses, segments and statistics, without a GPU."""

from vdnn.sim.allocator.caching import DEFAULT_POOL, CachingAllocator
from vdnn.sim.allocator.driver import AddressSpace, Driver
from vdnn.sim.allocator.options import AllocatorOptions, parse_settings

__all__ = ["DEFAULT_POOL", "AddressSpace", "AllocatorOptions", "CachingAllocator", "Driver", "parse_settings"]
