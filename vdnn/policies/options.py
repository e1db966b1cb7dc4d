"""What can be asked of a policy, checked before anything expensive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vdnn.analysis.torch7 import REGIMES, Regime
from vdnn.errors import UsageError, unknown_name
from vdnn.values.algorithms import AlgorithmTable, algorithm_table

__all__ = ["RULES", "Options"]

RULES = ("event", "paper")


@dataclass(frozen=True, slots=True)
class Options:
    """How to decide.

    `rules`: "event" bounds what is on its way in bytes; "paper" synchronises at every layer, as vDNN does.
    `min_bytes`: smaller storages stay. Of the event rules only: `max_inflight_bytes` is the most that may be
    on its way out before the compute stream waits for the oldest copy, `window_bytes` how far ahead of its
    use a copy back may start; None takes the largest storage that is offloaded, which is as much as the
    paper's rules hold. `keep_soon` keeps what backward needs before its copy out could be over.

    `regime`: "paper" plans the step as Torch7 ran it, by the paper's rules, whatever the sizes (vdnn.analysis.torch7).
    `algorithms`: the table of convolution algorithms that the -m and -p policies and `vdnn-dyn` choose from; ""
    takes cudnn4 under the paper's regime and none otherwise. `budget_bytes`: device memory that `vdnn-dyn` plans
    for; None takes the machine's.
    """

    rules: Literal["event", "paper"] = "event"
    min_bytes: int = 1 << 20
    max_inflight_bytes: int | None = None
    window_bytes: int | None = None
    keep_soon: bool = True
    regime: Regime = "pytorch"
    algorithms: str = ""
    budget_bytes: int | None = None

    @property
    def table(self) -> AlgorithmTable | None:
        """The table of convolution algorithms to choose from, if there is one."""
        name = self.algorithms or ("cudnn4" if self.regime == "paper" else "")
        return algorithm_table(name) if name else None

    def check(self) -> None:
        """Name the first option that is wrong.

        Raises:
            UsageError: unknown rules, regime or table, or a negative size.
        """
        if self.rules not in RULES:
            raise unknown_name("rules", str(self.rules), RULES)
        if self.regime not in REGIMES:
            raise unknown_name("regime", str(self.regime), REGIMES)
        if self.algorithms:
            algorithm_table(self.algorithms)
        for name in ("min_bytes", "max_inflight_bytes", "window_bytes", "budget_bytes"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
                raise UsageError(f"{name} is {size!r}: give a number of bytes, 0 or more")
