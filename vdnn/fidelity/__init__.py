"""How far predictions are from published measurements, and the fit of the cost model's numbers to them.

rows       the published rows: timm's steps, NeuSight's kernels
captures   the traces of timm's rows, kept in a folder
steps      many steps priced at once, fast enough to fit
fitting    the numbers that fit best; rows that were not fitted, predicted
accuracy   errors of predictions by group
memory     does a step fit: the batch that did, and the next that did not
times      the experiment's part on times: cross-validation, GPUs left out, tables and figures
"""

from vdnn.fidelity.captures import Captures
from vdnn.fidelity.rows import KernelRow, StepRow, kernel_rows, step_rows

__all__ = ["Captures", "KernelRow", "StepRow", "kernel_rows", "step_rows"]
