"""The cases, and the table of docs/cases.md that is made from them and the tests' markers.

python -m tests.engine.cases.catalogue            writes docs/cases.md
"""

from __future__ import annotations

import ast
from pathlib import Path

__all__ = ["CASES", "ROOT", "RULES", "marked_tests", "table"]

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "cases.md"

# What must hold. In brackets: only on a CUDA device, so skipped where there is none.
CASES = {
    1: "a sequential MLP",
    2: "convolutional networks with in-place ReLU; batch norm statistics are updated once",
    3: "language models with SDPA and eager attention, whose labels are an offset view",
    4: "frozen parameters with adapters",
    5: "dropout draws the same mask, and the generator ends where it would",
    6: "autocast in bf16 and fp16, with a gradient scaler and skipped steps",
    7: "many optimizer steps: parameters are equal at the end",
    8: "gradients accumulated over 1, 2 and 5 micro-batches",
    9: "many small tensors of random sizes",
    10: "two forwards, then two backwards, in either order",
    11: "a module that runs twice, a tied head",
    12: "tuples, lists, dicts, None and keywords as inputs and outputs",
    13: "inputs and outputs that need no gradient",
    14: "saved integers, booleans, complex and conjugated numbers, sparse, empty and scalar tensors",
    15: "backward returns a view of an unpacked tensor",
    16: "a recomputation keeps a view",
    17: "compute on a stream of the user's, in forward, backward or both",
    18: "offset views and clones of strided ones",
    19: "an unpack while the copy out is on its way",
    20: "large tensors that die right after their last use",
    21: "a host block taken by the next step while its copy back is late",
    22: "a write to a saved tensor while its copy out is late",
    23: "a tensor saved several times: one host copy",
    24: "transposes and slices at one address",
    25: "interleaved views of one base",
    26: "a view is saved and its base is not: the memory is really freed",
    27: "a table that all layers share",
    28: "an address that is used again is another tensor",
    29: "expanded tensors",
    30: "strides, offsets, channels_last and dtype come back as they were",
    31: "attention with a strided mask",
    32: "parameters, their transposes and buffers never move, replaced ones neither",
    33: "tensors that others hold: nothing is copied for nothing, and the report names them",
    34: "backward two and three times",
    35: "gradients of gradients, with the block open and closed",
    36: "a node's saved tensors read twice",
    37: "a change in place raises as in eager; two versions are two values",
    38: "backward outside the block, in another thread, of a subset, in parts",
    39: "a hundred graphs dropped without backward leave nothing",
    40: "a branch that is computed and not used",
    41: "evaluation between training steps",
    42: "an error in forward, in backward, in a hook, in a copy, in any op: the next step is exact",
    43: "a block or model wrapped twice is an error; two blocks nest",
    44: "with save_on_cpu, and with both kinds of checkpoint, inside and around",
    45: "an autograd function of the user's",
    46: "tensor subclasses pass through; transforms of torch.func are refused",
    47: "copies and pickles are plain models, names stay, unwrap restores the model",
    48: "a wrapped model dies without the garbage collector",
    49: "what leaves the device is what the host takes; the peak falls as predicted",
    50: "memory returns to where it was; no host memory is taken after the second step",
    51: "host bytes reserved are within 2 % of bytes moved; budgets hold; pageable where pinning fails",
    52: "any least size and window, one layer, none at all",
    53: "where offload does not lower the peak, it declines or says so",
    54: "no synchronization in a step [`set_sync_debug_mode`, the GPU script]",
    55: "copies overlap with compute [the GPU script]",
    56: "two hundred steps hold no more than two",
    57: "DDP and FSDP2; two GPUs in one process",
    58: "torch.compile around and inside",
    59: "without a GPU everything imports and wrap says that it does nothing",
    60: "declines what fits, keeps what the budget allows, plans anew, is monotone",
    61: "the predicted peak is the measured one",
}
# Not checked by a test that runs everywhere, and why.
ELSEWHERE = {
    54: "`experiments/gpu/parts/streams.py`: needs a GPU, and none was at hand so far",
    55: "`experiments/gpu/parts/compared.py`: needs a GPU, and none was at hand so far",
}

# The engine's rules, and the cases that each of them is for.
RULES = {
    "a change in place is noticed at unpack, exactly where eager notices it": (22, 24, 37),
    "parameters, buffers and autocast's copies of them never move, found by storage": (4, 6, 32),
    "one copy for each storage and version; views come back by offset, shape and stride": (18, *range(23, 32)),
    "what autograd holds owns the bytes; it may die at any time and in any thread": (10, 34, 35, 36, 38, 39, 40, 48),
    "the current stream is looked up at every use": (17,),
    "a copy back waits for its own copy out, on every path, and memory for the last copy that uses it": (19, 20, 21),
    "no host synchronization in a step": (54,),
    "copies in flight are bounded in bytes; beyond, the compute stream waits": (52,),
    "two side streams; pinned memory in one piece, exact, reused, within a budget, never an abort": (49, 50, 51, 55),
    "never touched: other devices, small, expanded and fake tensors, unknown subclasses": (13, 14, 29, 46, 52),
    "an error anywhere leaves nothing behind; nesting is an error; copies, pickles and names stay": (42, 43, 47),
}
# What holds of the rules altogether, and where it is tested.
ALTOGETHER = (
    "Every event record, wait, version comparison, lock, bound and hand-over of the engine is taken out, one at "
    "a time, and must be missed: `tests/engine/mutation`. Drawn networks under drawn rules and plans, in many orders "
    "of events: `tests/engine/test_exploration.py`. The lifecycle of a storage, its moves checked: "
    "`test_a_state_that_does_not_allow_a_move_is_named`. `CudaDevice` on a CUDA that only records: "
    "`every_call_is_one_of_cudas` in `tests/engine/mutation/scenarios`. Models that do what few do: "
    "`tests/engine/test_odd_models.py`."
)


def marked_tests() -> dict[int, list[str]]:
    """The tests with `@pytest.mark.case(n, …)`, as FILE::NAME, by number."""
    found: dict[int, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.case":
                    for number in (ast.literal_eval(argument) for argument in decorator.args):
                        found.setdefault(number, []).append(f"{path.relative_to(ROOT)}::{node.name}")
    return found


def table() -> str:
    """The page, whole."""
    tests = marked_tests()
    lines = [
        "# The cases",
        "",
        "What an activation offloader must get right: each of these broke in an existing one. Every case has a",
        "test on the virtual device, and the same test on CUDA where there is one, unless the table says otherwise.",
        "`python -m tests.engine.cases.catalogue` makes this page from the tests' markers.",
        "",
        "| case | what must hold | tests |",
        "| --- | --- | --- |",
    ]
    for number, text in CASES.items():
        names = sorted({name.split("::")[1] for name in tests.get(number, [])})
        cell = ", ".join(f"`{name}`" for name in names)
        if number in ELSEWHERE:
            cell = "; ".join(part for part in (cell, ELSEWHERE[number]) if part)
        lines.append(f"| {number} | {text} | {cell or 'none yet'} |")
    lines += ["", "## The engine's rules, and the cases that try them", "", "| rule | cases |", "| --- | --- |"]
    lines += [f"| {rule} | {', '.join(map(str, numbers))} |" for rule, numbers in RULES.items()]
    return "\n".join([*lines, "", ALTOGETHER]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(table())
