"""Local search: changes of one decision at a time that make a fitting step faster.

where compute waits for a copy    keep that storage, compute it again, encode it, or move another in its place
everywhere                        one block more or less, one code more or less, back to keeping what is dear

First without more bytes requested than there were; then as far as the allocator's model lets them in.
"""

from __future__ import annotations

from dataclasses import replace

from vdnn.planner.search import Found, Search

__all__ = ["Improving"]

_AHEAD = (0, 1, 3)
# Targets, in sixteenths of what is requested at most, above which nothing comes back before it is asked for.
_SOONER = (17, 16, 15, 14, 13, 12, 10, 8)


class Improving:
    """Steps downhill from what a search found."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def improve(self, start: Found, budget: int, work: int) -> Found:
        """Changes of one decision at a time that make a fitting step faster, until none does or enough was tried."""
        best = start
        limit = self.search.work + work
        for ahead in _AHEAD:
            best = self._better(best, self.search.judge(best.choice, best.away, best.target_bytes, ahead), budget)
        if start.target_bytes < start.requested_bytes:  # all comes back on demand: sooner, where there is room
            for part in _SOONER:
                tried = self.search.judge(best.choice, best.away, start.requested_bytes * part // 16, start.ahead)
                if self._better(best, tried, budget) is tried:
                    best = tried
                    break
        best = self._stepped(best, budget, limit, strict=True)
        return self._stepped(best, budget, limit, strict=False)

    def _stepped(self, best: Found, budget: int, limit: int, *, strict: bool) -> Found:
        """Changes until none helps: `strict` ones request no more than before, or than the target."""
        failed: set[tuple[str, int, int]] = set()
        going = True
        while going:
            going = False
            for change in self._changes(best):
                if self.search.work >= limit:
                    return best
                if change in failed:
                    continue
                most = max(best.target_bytes, best.requested_bytes) if strict else budget
                tried = self._changed(best, change, most)
                if tried is not None and self._better(best, tried, budget) is tried:
                    best, going = tried, True
                    break
                failed.add(change)
        return best

    def _better(self, best: Found, tried: Found, budget: int) -> Found:
        return tried if tried.rank < best.rank and self.search.fits(tried, budget) else best

    def _changes(self, best: Found) -> list[tuple[str, int, int]]:
        """What might help, the most promising first: (kind, storage or block, other)."""
        choices, choice = self.search.choices, best.choice
        made = choices.made(choice)
        out, parcels, size_of = set(best.away), made.parcels, self.search.trace.storages
        base = choices.base(choice.blocks)
        assert base is not None
        stalls = {made.origin[s]: ns for s, ns in best.schedule.stalls.items()}
        waited = sorted((s for s in stalls if stalls[s] > 0), key=lambda s: -stalls[s])
        others = sorted((s for s in parcels if s not in out), key=lambda s: parcels[s].out)
        again_ns = {s: choices.again_ns.get(s, 0) for s in base.chains}
        found: list[tuple[str, int, int]] = [("target", 0, up) for up in (64, 16)]
        for s in waited[:12]:
            found.append(("keep", s, -1))
            if s in base.chains:
                found.append(("drop", s, -1))
            if s in choices.codes and s not in choice.coded:
                found.append(("code", s, -1))
        found += [("unblock", c, -1) for c in sorted(choice.blocks, key=lambda c: -choices.block_ns[c])[:12]]
        found += [("uncode", s, -1) for s in sorted(choice.coded, key=lambda s: -choices.code_ns[s])[:12]]
        free = [c for c in choices.blocks if c not in choice.blocks]
        size = {c: sum(size_of[s].nbytes for s in choices.blocks[c].dropped) for c in free}
        found += [("block", c, -1) for c in sorted(free, key=lambda c: (choices.block_ns[c] / size[c], c))[:8]]
        codes = [s for s in choices.codes if s not in choice.coded and choices.saving[s]]
        found += [("code", s, -1) for s in sorted(codes, key=lambda s: choices.code_ns[s] / choices.saving[s])[:12]]
        cheap = sorted((s for s in base.chains if s in out), key=lambda s: again_ns[s] / size_of[s].nbytes)
        found += [("drop", s, -1) for s in cheap[:24]]
        kept = [s for s in base.chains if s not in out and s not in choice.dropped and s in parcels]
        found += [("drop", s, -1) for s in sorted(kept, key=lambda s: again_ns[s] / size_of[s].nbytes)[:24]]
        for s in waited[:6]:
            size_s = size_of[s].nbytes
            near = sorted(others, key=lambda o: (abs(size_of[o].nbytes - size_s), parcels[o].out))[:4]
            found += [("swap", s, o) for o in near]
        for s in sorted(best.away, key=lambda s: (-size_of[s].nbytes, parcels[s].out)):
            found.append(("keep", s, -1))
        found += [("undrop", s, -1) for s in sorted(choice.dropped, key=lambda s: -again_ns[s])[:24]]
        return list(dict.fromkeys(found))

    def _changed(self, best: Found, change: tuple[str, int, int], most: int) -> Found | None:
        kind, what, other = change
        choice, target = best.choice, best.target_bytes
        if kind == "target":
            return self.search.judge(choice, best.away, target + target // other, best.ahead)
        wanted = {
            "drop": replace(choice, dropped=choice.dropped | {what}, coded=choice.coded - {what}),
            "undrop": replace(choice, dropped=choice.dropped - {what}),
            "code": replace(choice, coded=choice.coded | {what}, dropped=choice.dropped - {what}),
            "uncode": replace(choice, coded=choice.coded - {what}),
            "unblock": replace(choice, blocks=choice.blocks - {what}),
        }.get(kind, choice)
        if kind == "block":
            wanted = replace(choice, blocks=self.search.choices.beside(choice.blocks, what))
        settled = self.search.choices.settled(wanted)
        if settled is None or (kind == "code" and what not in settled.coded):
            return None
        away = [s for s in best.away if s != what or kind in ("block", "unblock")]
        if kind == "swap":
            away.append(other)
        tried = self.search.judge(settled, away, target, best.ahead)
        if tried.requested_bytes > most and kind in ("undrop", "uncode"):
            tried = self.search.judge(settled, [*away, what], target, best.ahead)
        if tried.requested_bytes > most and kind == "unblock":
            parcels = self.search.choices.made(settled).parcels
            inner = [s for s in self.search.choices.blocks[what].dropped if s in parcels and s not in away]
            tried = self.search.judge(settled, [*away, *inner], target, best.ahead)
        if tried.requested_bytes > most:
            return None
        return self._shed(tried) if kind in ("drop", "code", "block") else tried

    def _shed(self, found: Found) -> Found:
        """Without the offloads that are waited for and not needed any more."""
        best = found
        origin, stalls = self.search.choices.made(found.choice).origin, found.schedule.stalls
        for number in sorted((s for s in stalls if stalls[s] > 0), key=lambda s: -stalls[s])[:3]:
            rest = [s for s in best.away if s != origin[number]]
            tried = self.search.judge(best.choice, rest, best.target_bytes, best.ahead)
            if tried.requested_bytes <= best.target_bytes and tried.time_ns < best.time_ns:
                best = tried
        return best
