"""The CUDA caching allocator once more: slow, without any cleverness, to check the model against.

Memory is a list of segments, a segment a list of pieces in order of address. Every search looks at every piece,
every join goes over the whole segment, and every statistic is counted anew from the pieces after each step. What
comes of it is compared with the model event by event. It shares nothing with the model but the device below it,
the options' values, and the names of the events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

MIB = 2**20
NO_LIMIT = 2**60


@dataclass
class Piece:
    addr: int
    size: int
    state: str  # free, allocated, awaiting, unmapped, new
    requested: int = 0
    uses: list[int] = field(default_factory=list)
    waits: set[int] = field(default_factory=set)
    born: int = 0


@dataclass
class Segment:
    small: bool
    stream: int
    pieces: list[Piece]
    page: int = 0  # more than 0: expandable


class OutOfMemory(Exception):
    pass


class Oracle:
    def __init__(self, driver, options, allowed=None):
        self.driver, self.options, self.allowed = driver, options, allowed
        self.segments: list[Segment] = []
        self.queues: dict[int, list[list]] = {}  # stream → [piece, done]
        self.searches = {True: 0, False: 0}
        self.history = []
        self.numbers: dict[str, int] = {}
        self.retries = self.ooms = 0
        self.observe()

    # -- rounding ----------------------------------------------------------------------------------

    def rounded(self, size):
        size = max(size, 512)
        interval = 0
        while interval < 15 and size >= 2 ** (21 + interval):
            interval += 1
        divisions = self.options.roundup_divisions[interval]
        if divisions >= 2 and size > 512 * divisions:
            low = 1
            while 2 * low <= size:
                low *= 2
            return next(low + low * k // divisions for k in range(divisions + 1) if low + low * k // divisions >= size)
        while size % 512:
            size += 1
        return size

    def segment_size(self, rounded):
        if rounded <= MIB:
            return 2 * MIB
        if rounded < 10 * MIB:
            return self.options.large_segment_bytes
        return next(n * 2 * MIB for n in range(1, 10**6) if n * 2 * MIB >= rounded)

    # -- calls --------------------------------------------------------------------------------------

    def malloc(self, size, stream):
        self.poll()
        rounded = self.rounded(size)
        small = rounded <= MIB
        if self.collects():
            self.searches[small] += 1
        found = self.find(small, stream, rounded)
        if found is None:
            if self.collects():
                self.collect()
            found = self.extend(small, stream, rounded)
            if found is None and self.release_oversize(small, stream, rounded):
                found = self.extend(small, stream, rounded)
            if found is None:
                self.empty_cache()
                self.retries += 1
                found = self.extend(small, stream, rounded)
        if found is None:
            self.ooms += 1
            self.tell("oom", self.driver.free_bytes(), rounded, stream)
            raise OutOfMemory
        segment, piece = found
        rest = piece.size - rounded
        most = self.options.max_split_bytes or NO_LIMIT
        if ((small or segment.page) and rest >= 512) or (not small and rounded < most and rest > MIB):
            piece.size = rounded
            born = self.searches[small]
            segment.pieces.insert(segment.pieces.index(piece) + 1, Piece(piece.addr + rounded, rest, "free", born=born))
        piece.state, piece.requested = "allocated", size
        self.tell("alloc", piece.addr, size, stream)
        self.observe()
        return piece.addr

    def free(self, addr):
        segment, piece = self.at(addr)
        self.tell("free_requested", addr, piece.requested, segment.stream)
        if piece.uses:
            piece.state = "awaiting"
            piece.waits = set(piece.uses)
            for stream in piece.uses:
                self.queues.setdefault(stream, []).append([piece, False])
            piece.uses = []
        else:
            self.completed(piece)
        self.observe()

    def record_stream(self, addr, stream):
        segment, piece = self.at(addr)
        if stream != segment.stream and stream not in piece.uses:
            piece.uses.append(stream)

    def finish(self, stream):
        for entry in self.queues.get(stream, []):
            entry[1] = True

    def poll(self):
        for stream in list(self.queues):
            while self.queues[stream] and self.queues[stream][0][1]:
                self.passed(stream, self.queues[stream].pop(0)[0])
            if not self.queues[stream]:
                del self.queues[stream]

    def passed(self, stream, piece):
        piece.waits.remove(stream)
        if not piece.waits:
            self.completed(piece)

    def completed(self, piece):
        segment = next(s for s in self.segments if any(p is piece for p in s.pieces))
        self.tell("free_completed", piece.addr, piece.requested, segment.stream)
        piece.state, piece.requested, piece.born = "free", 0, self.searches[segment.small]
        self.join(segment)
        self.observe()

    def join(self, segment):
        joined = []
        for piece in segment.pieces:
            if joined and piece.state == joined[-1].state and piece.state in ("free", "unmapped"):
                joined[-1].size += piece.size
                joined[-1].born = self.searches[segment.small]
            else:
                joined.append(piece)
        segment.pieces = joined

    # -- finding ------------------------------------------------------------------------------------

    def free_pieces(self, small, stream):
        """By size; of equal ones in order of their segments' making, which is that of the list, and of address."""
        found = [
            (p.size, p.addr, s, p)
            for s in self.segments
            if s.small == small and s.stream == stream
            for p in s.pieces
            if p.state == "free"
        ]
        return sorted(found, key=lambda item: item[:1] if self.options.oldest_segment_first else item[:2])

    def find(self, small, stream, rounded):
        fitting = [item for item in self.free_pieces(small, stream) if item[0] >= rounded]
        if not fitting:
            return None
        if self.options.expandable_segments:

            def reach(item):
                _, _, segment, piece = item
                after = segment.pieces[segment.pieces.index(piece) + 1 :]
                return piece.size + (after[0].size if after and after[0].state == "unmapped" else 0)

            while len(fitting) > 1 and reach(fitting[1]) < reach(fitting[0]):
                fitting.pop(0)
        size, _, segment, piece = fitting[0]
        most = self.options.max_split_bytes or NO_LIMIT
        if rounded < most and size >= most:
            return None
        if rounded >= most and size >= rounded + self.options.max_non_split_rounding_bytes:
            return None
        return segment, piece

    # -- segments -----------------------------------------------------------------------------------

    def reserved(self):
        return sum(p.size for s in self.segments for p in s.pieces if p.state != "unmapped")

    def extend(self, small, stream, rounded):
        size = self.segment_size(rounded)
        if self.allowed is not None and self.reserved() + size > self.allowed:
            return None
        if self.options.expandable_segments:
            return self.extend_pages(small, stream, rounded)
        addr = self.driver.allocate(size, stream, small)
        if addr is None:
            return None
        piece = Piece(addr, size, "new")
        self.segments.append(Segment(small, stream, [piece]))
        self.tell("segment_alloc", addr, size, stream)
        self.observe()
        return self.segments[-1], piece

    def extend_pages(self, small, stream, rounded):
        """The lowest run of free and unmapped pieces that is long enough and can grow; its hole gets pages."""
        page = 2 * MIB if small else self.options.large_segment_bytes
        mine = [s for s in self.segments if s.small == small and s.stream == stream]
        starts = []
        for segment in mine:
            for i, piece in enumerate(segment.pieces):
                if piece.state == "unmapped":
                    first = i - 1 if i and segment.pieces[i - 1].state == "free" else i
                    room = 0
                    for other in segment.pieces[first:]:
                        if other.state not in ("free", "unmapped"):
                            break
                        room += other.size
                    if room >= rounded:
                        starts.append((piece.addr, segment, segment.pieces[first].addr))
        if starts:
            _, segment, addr = min(starts, key=lambda start: start[0])
        else:
            memory = self.driver.total_bytes() * 9 // 8
            whole = (memory + page - 1) // page * page
            addr = self.driver.reserve(whole, stream, small)
            segment = Segment(small, stream, [Piece(addr, whole, "unmapped")], page)
            self.segments.append(segment)
        while True:
            piece = next(p for p in segment.pieces if p.addr == addr)
            if piece.state == "free" and piece.size >= rounded:
                return segment, piece
            hole = piece if piece.state == "unmapped" else segment.pieces[segment.pieces.index(piece) + 1]
            missing = rounded - (piece.size if piece.state == "free" else 0)
            pages = (min(missing, hole.size) + page - 1) // page * page
            if not self.driver.map(hole.addr, pages):
                return None
            self.tell("segment_map", hole.addr, pages, stream)
            i = segment.pieces.index(hole)
            parts = [Piece(hole.addr, pages, "free", born=self.searches[small])]
            if pages < hole.size:
                parts.append(Piece(hole.addr + pages, hole.size - pages, "unmapped"))
            segment.pieces[i : i + 1] = parts
            self.join(segment)
            self.observe()

    def release(self, segment):
        piece = segment.pieces[0]
        self.segments = [s for s in self.segments if s is not segment]
        self.tell("segment_free", piece.addr, piece.size, segment.stream)
        self.driver.release(piece.addr, piece.size)
        self.observe()

    def release_oversize(self, small, stream, rounded):
        most = self.options.max_split_bytes
        if most is None or self.options.expandable_segments:
            return False
        wanted = max(most, rounded)
        pieces = self.free_pieces(small, stream)
        enough = [item for item in pieces if item[0] >= wanted]
        if enough:
            self.release(enough[0][2])
            return True
        released = 0
        for size, _, segment, _ in reversed(pieces):
            if released >= wanted or size < most:
                break
            released += size
            self.release(segment)
        return released >= wanted

    def empty_cache(self):
        waiting, self.queues = self.queues, {}
        for stream, entries in waiting.items():
            for piece, _ in entries:
                self.passed(stream, piece)
        for small in (False, True):
            for stream in sorted({s.stream for s in self.segments}):
                for _, _, segment, piece in self.free_pieces(small, stream):
                    if segment.page:
                        self.unmap(segment, piece)
                    elif len(segment.pieces) == 1:
                        self.release(segment)

    def unmap(self, segment, piece):
        base, page = segment.pieces[0].addr, segment.page
        pages = [
            addr
            for addr in range(base, piece.addr + piece.size, page)
            if piece.addr <= addr and addr + page <= piece.addr + piece.size
        ]
        if not pages:
            return
        start, stop = pages[0], pages[-1] + page
        born = self.searches[segment.small]
        parts = [
            Piece(piece.addr, start - piece.addr, "free", born=born),
            Piece(start, stop - start, "unmapped"),
            Piece(stop, piece.addr + piece.size - stop, "free", born=born),
        ]
        i = segment.pieces.index(piece)
        segment.pieces[i : i + 1] = [part for part in parts if part.size]
        self.tell("segment_unmap", start, stop - start, segment.stream)
        self.driver.unmap(start, stop - start)
        self.join(segment)
        if len(segment.pieces) == 1 and segment.pieces[0].state == "unmapped":
            self.segments = [s for s in self.segments if s is not segment]
        self.observe()

    def collects(self):
        return self.allowed is not None and self.options.garbage_collection_threshold > 0

    def collect(self):
        wanted = self.reserved() - int(self.options.garbage_collection_threshold * self.allowed)
        got = 0
        while got < wanted:
            whole = [
                (s, p)
                for stream in sorted({s.stream for s in self.segments})
                for _, _, s, p in self.free_pieces(False, stream)
                if len(s.pieces) == 1 and not s.page
            ]
            if not whole:
                return
            ages = [self.searches[False] - p.born for _, p in whole]
            average = Fraction(sum(ages), len(ages))
            for (segment, piece), age in zip(whole, ages, strict=True):
                if age >= average:
                    got += piece.size
                    self.release(segment)

    # -- what can be seen ---------------------------------------------------------------------------

    def at(self, addr):
        return next((s, p) for s in self.segments for p in s.pieces if p.addr == addr and p.state == "allocated")

    def tell(self, action, addr, size, stream):
        self.history.append((action, addr, size, stream))

    def observe(self):
        """Count everything, and keep the largest of each."""
        for pool, chosen in (("all", (True, False)), ("small_pool", (True,)), ("large_pool", (False,))):
            pieces = [(s, p) for s in self.segments if s.small in chosen for p in s.pieces if p.state != "unmapped"]
            allocated = [p for _, p in pieces if p.state == "allocated"]
            active = [p for _, p in pieces if p.state in ("allocated", "awaiting")]
            split = [p for s, p in pieces if p.state == "free" and len(s.pieces) > 1 and not s.page]
            now = {
                "allocation": len(allocated),
                "allocated_bytes": sum(p.size for p in allocated),
                "requested_bytes": sum(p.requested for p in active),
                "active": len(active),
                "active_bytes": sum(p.size for p in active),
                "inactive_split": len(split),
                "inactive_split_bytes": sum(p.size for p in split),
                "segment": len([s for s in self.segments if s.small in chosen and not s.page]),
                "reserved_bytes": sum(p.size for _, p in pieces),
            }
            for kind, number in now.items():
                self.numbers[f"{kind}.{pool}.current"] = number
                peak = f"{kind}.{pool}.peak"
                self.numbers[peak] = max(self.numbers.get(peak, 0), number)

    def layout(self):
        """Every mapped stretch: its pieces as (address, size, state, requested)."""
        stretches, last = [], None
        for segment in self.segments:
            last = None
            for piece in segment.pieces:
                if piece.state != "unmapped":
                    if last is None or last.state == "unmapped":
                        stretches.append([])
                    stretches[-1].append((piece.addr, piece.size, piece.state, piece.requested))
                last = piece
        return sorted(stretches)
