"""The tools see what is new: lines that nobody has written yet, locks that nobody has forgotten yet."""

from __future__ import annotations

import ast
import threading
from collections import Counter
from types import ModuleType

import pytest

from tests.engine.mutation.loading import MutationError, engine_with
from tests.engine.mutation.locksets import Monitor, watched
from tests.engine.mutation.operators import KINDS, UNRECORDED, mutants_of
from vdnn.errors import RaceError

MADE_UP = """
class Arena:
    def __init__(self, device):
        self._arena_lock = threading.Lock()
        self.data = device.bytes
    def serve(self, device, block, tensor, reader):
        with self._arena_lock, torch.no_grad():
            block.busy = device.record(device.current_stream())
        device.wait(device.offload_stream, block.busy)
        stream.wait_event(stream.record_event())
        torch.cuda.synchronize()
        if tensor._version != block.version and self.used > self.most_in_flight_limit:
            return tensor.detach()
        if self.budget_bytes >= self.used or block.storage is tensor.untyped_storage():
            device.drop(block, reader)
        block.data = None
        block.mark.check_read(reader, "a reader")
        shift = tensor.data_ptr() % device.alignment
        return self.holds(tensor) and shift
    def blocks(self):
        with self._block:
            recorded = self.record
            return [block for block in self.kept if block.nbytes > 4]
"""


def test_new_lines_get_mutants_and_each_changes_its_own_place_only() -> None:
    mutants = mutants_of(MADE_UP, "arena.py")
    assert Counter(mutant.kind for mutant in mutants) == {
        "lock": 1,
        "hand-over": 2,
        "record": 2,
        "wait": 3,
        "version": 1,
        "bound": 2,
        "probe": 1,
        "identity": 1,
        "memory": 1,
        "check": 1,
        "address": 1,
        "untouched": 1,
    }
    whole = ast.unparse(ast.parse(MADE_UP)).splitlines()
    for mutant in mutants:
        without = ast.unparse(mutant.tree).splitlines()
        if mutant.kind != "lock":
            (changed,) = [(old, new) for old, new in zip(whole, without, strict=True) if old != new]
            assert mutant.text in changed[0]
    texts = {mutant.kind: ast.unparse(mutant.tree) for mutant in mutants}
    assert "with torch.no_grad():\n            block.busy" in texts["lock"]
    assert f"stream.wait_event({UNRECORDED}(stream.record_event()))" in texts["record"]
    assert "if True and" not in texts["version"]
    assert "if False and" in texts["version"]
    assert {mutant.kind for mutant in mutants} == set(KINDS)


def test_a_wait_may_be_any_call_of_that_kind_and_a_name_alone_is_none() -> None:
    kinds = [m.kind for m in mutants_of("device.wait\nself._wait(s)\nx.wait_for(e)\nx.awaits(e)\nwait = 3\n", "x.py")]
    assert kinds == ["wait", "wait"]


def test_a_file_without_any_of_it_has_no_mutants() -> None:
    assert mutants_of("def area(width, height):\n    return width * height\n", "area.py") == []


def test_an_event_of_an_unknown_form_is_not_taken_for_a_finding() -> None:
    (mutant,) = mutants_of("event = object.record()", "x.py")
    with engine_with() as engine:
        unrecorded = vars(engine)[UNRECORDED]
    namespace = {UNRECORDED: unrecorded, "object": type("Stream", (), {"record": staticmethod(lambda: 7)})}
    with pytest.raises(MutationError, match="teach"):
        exec(compile(mutant.tree, "x.py", "exec"), namespace)


def test_an_engine_is_loaded_beside_the_real_one_and_leaves_it_alone() -> None:
    import vdnn.engine as real

    with engine_with() as engine:
        assert engine is not real
        assert engine.VirtualDevice is not real.VirtualDevice
        assert issubclass(RaceError, Exception)
    import vdnn.engine as after

    assert after is real


# -- lock sets -------------------------------------------------------------------------------------

SHARED = """
import threading
from collections import deque
class Shelf:
    def __init__(self):
        self.lock, self.other = threading.Lock(), threading.RLock()
        self.count, self.items, self.queue, self.name = 0, {}, deque(), "shelf"
    def locked(self):
        with self.lock:
            self.count += 1
            self.items[self.count] = 1
    def unlocked(self):
        self.count += 1
    def under_another_lock(self):
        with self.other:
            self.items.clear()
    def read_only(self):
        return self.name
    def push(self):
        self.queue.append(1)
    def walk(self):
        with self.lock:
            return [item for item in self.queue]
"""


@pytest.mark.parametrize(
    ("calls", "field"),
    [
        (("locked", "locked", "locked"), ""),
        (("locked", "unlocked", "locked"), "Shelf.count"),
        (("unlocked", "locked", "unlocked"), "Shelf.count"),
        (("locked", "under_another_lock", "locked"), "Shelf.items[]"),
        (("read_only", "read_only", "read_only"), ""),
        (("push", "push", "push"), ""),
        (("push", "walk", "push"), "Shelf.queue[]"),
    ],
)
def test_a_field_without_a_common_lock_is_found_though_the_threads_run_one_after_the_other(
    calls: tuple[str, ...], field: str
) -> None:
    monitor = Monitor()
    module = ModuleType("vdnn.engine.shelf")
    vars(module).update(monitor.names)
    tree = ast.fix_missing_locations(watched(ast.parse(SHARED)))
    exec(compile(tree, "shelf.py", "exec"), vars(module))
    shelf = module.Shelf()
    for name in calls:
        thread = threading.Thread(target=getattr(shelf, name))
        thread.start()
        thread.join()
    getattr(shelf, calls[0])()
    assert {race.split(" is ")[0] for race in monitor.races} == ({field} if field else set())
