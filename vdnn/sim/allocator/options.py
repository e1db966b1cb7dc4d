"""What `PYTORCH_ALLOC_CONF` can set of the device allocator, and the two roundings that depend on it.

Source of the rules: c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11 to 2.14.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vdnn.errors import FormatError, UsageError

__all__ = [
    "LARGE_SEGMENT",
    "MIN_BLOCK",
    "MIN_LARGE",
    "ROUND_LARGE",
    "SMALL_MOST",
    "SMALL_SEGMENT",
    "AllocatorOptions",
    "parse_settings",
]

MIN_BLOCK = 512
SMALL_MOST = 1 << 20  # the largest block of the small pool
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
MIN_LARGE = 10 << 20  # from here on a segment is made to measure
ROUND_LARGE = 2 << 20
_INTERVALS = 16  # of `roundup_power2_divisions`: sizes up to 2 MiB, 4 MiB, … 64 GiB
_MIB = 1 << 20
# Keys of other parts of the allocator, which change nothing here.
_OTHER_KEYS = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "per_process_memory_fraction",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "release_lock_on_cudamalloc",
        "throw_on_cudamalloc_oom",
    }
)


@dataclass(frozen=True, slots=True)
class AllocatorOptions:
    """The device allocator's settings, in bytes.

    `max_split_bytes`: larger blocks are never split (None: all may be). `roundup_divisions`: into how many steps
    the space between two powers of two is divided, by interval of size; 0 or 1: round to 512 bytes.
    `garbage_collection_threshold` works only with a limit on what the process may take. `oldest_segment_first` is no
    setting but a change between releases: of free blocks of equal size torch 2.14 takes the one whose segment was made
    first, 2.11 the one with the lowest address.
    """

    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT
    large_segment_bytes: int = LARGE_SEGMENT
    roundup_divisions: tuple[int, ...] = (0,) * _INTERVALS
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    oldest_segment_first: bool = True

    def check(self) -> None:
        """Name the first setting that torch would refuse.

        Raises:
            UsageError: a size below its least, a threshold outside 0 … 1, divisions that are no power of two.
        """
        least = max(LARGE_SEGMENT, self.large_segment_bytes)  # or it would give parts of segments back
        if self.max_split_bytes is not None and self.max_split_bytes < least:
            raise UsageError(
                f"max_split_size of {self.max_split_bytes} bytes is too small: give at least {least >> 20} MiB"
            )
        if self.max_non_split_rounding_bytes < LARGE_SEGMENT:
            raise UsageError(
                f"max_non_split_rounding of {self.max_non_split_rounding_bytes} bytes is too small: at least 20 MiB"
            )
        if self.large_segment_bytes <= MIN_LARGE:
            raise UsageError(f"large_segment_size of {self.large_segment_bytes} bytes must be more than 10 MiB")
        if not 0.0 <= self.garbage_collection_threshold < 1.0:
            raise UsageError(
                f"garbage_collection_threshold of {self.garbage_collection_threshold} is not between 0 and 1"
            )
        if len(self.roundup_divisions) != _INTERVALS:
            raise UsageError(f"roundup_power2_divisions has {len(self.roundup_divisions)} intervals, not {_INTERVALS}")
        for divisions in self.roundup_divisions:
            if divisions < 0 or divisions & (divisions - 1):
                raise UsageError(f"roundup_power2_divisions of {divisions} is not a power of two: give 2, 4, 8 …")

    def rounded(self, size: int) -> int:
        """The block size for a request, in bytes: at least 512, and a multiple of it.

        With divisions d: the next of the d equal steps between the powers of two below and above the request.
        """
        if size <= MIN_BLOCK:
            return MIN_BLOCK
        exponent = size.bit_length() - 1
        divisions = self.roundup_divisions[min(max(exponent - 20, 0), _INTERVALS - 1)]
        if divisions > 1 and size > MIN_BLOCK * divisions:
            if size & (size - 1) == 0:
                return size
            step = (1 << exponent) // divisions
            return -(-size // step) * step
        return -(-size // MIN_BLOCK) * MIN_BLOCK

    def segment(self, rounded: int) -> int:
        """How much is asked of CUDA for a block of that rounded size that no cached block can serve, in bytes."""
        if rounded <= SMALL_MOST:
            return SMALL_SEGMENT
        if rounded < MIN_LARGE:
            return self.large_segment_bytes
        return -(-rounded // ROUND_LARGE) * ROUND_LARGE


def parse_settings(text: str) -> AllocatorOptions:
    """Options from a string as in `PYTORCH_ALLOC_CONF`, such as "max_split_size_mb:128,expandable_segments:True".

    Raises:
        FormatError: a key that is not known, a value that cannot be, or another backend than torch's own.
    """
    found: dict[str, object] = {}
    rest = text.replace(" ", "")
    while rest:
        match = re.match(r"([^:,\[\]]+):(\[[^\]]*\]|[^,\[\]]*)(,|$)", rest)
        if match is None:
            raise FormatError(f"allocator settings {text!r}: {rest!r} is not key:value, or is not ended by a comma")
        key, value = match[1], match[2]
        rest = rest[match.end() :]
        try:
            if key == "max_split_size_mb":
                found["max_split_bytes"] = int(value) * _MIB
            elif key == "max_non_split_rounding_mb":
                found["max_non_split_rounding_bytes"] = int(value) * _MIB
            elif key == "large_segment_size_mb":
                found["large_segment_bytes"] = int(value) * _MIB
            elif key == "garbage_collection_threshold":
                found["garbage_collection_threshold"] = float(value)
            elif key == "roundup_power2_divisions":
                found["roundup_divisions"] = _divisions(value)
            elif key == "expandable_segments":
                found["expandable_segments"] = {"True": True, "False": False}[value]
            elif key == "backend":
                if value != "native":
                    raise FormatError(
                        f"allocator settings {text!r}: backend {value} is another allocator, only native is modelled"
                    )
            elif key not in _OTHER_KEYS:
                raise FormatError(f"allocator settings {text!r}: {key} is not a setting that is known here")
        except (ValueError, KeyError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"allocator settings {text!r}: {value!r} is no value for {key}") from None
    options = AllocatorOptions(**found)  # type: ignore[arg-type]
    try:
        options.check()
    except UsageError as error:
        raise FormatError(f"allocator settings {text!r}: {error}") from None
    return options


def _divisions(value: str) -> tuple[int, ...]:
    """`8`, or `[256:1,512:2,1024:4,>:8]`: MiB : divisions; the first also holds below it, ">" above the last."""
    if not value.startswith("["):
        return (int(value),) * _INTERVALS
    steps = [0] * _INTERVALS
    last = -1
    for part in value[1:-1].split(","):
        bound, _, count = part.partition(":")
        if bound == ">":
            first = max(last, 0) + 1
            steps[first:] = [int(count)] * (_INTERVALS - first)
            continue
        mib = int(bound)
        if mib <= 0 or mib & (mib - 1):
            raise ValueError(bound)
        index = min(mib.bit_length() - 1, _INTERVALS - 1)
        if last < 0:
            steps[:index] = [int(count)] * index
        steps[index] = int(count)
        last = index
    return tuple(steps)
