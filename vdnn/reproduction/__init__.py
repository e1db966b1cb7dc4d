"""The evaluation of the vDNN paper, run in the simulator and put beside the paper's own figures.

networks     the paper's networks and batch sizes
numbers      one network's numbers under every policy: what a run file holds
published    what the paper's bars show, from `published.toml`
differences  ours beside the paper's, with the tolerance of each figure
page         tables, figures and the list of misses, from the files under `results/paper/` alone
"""

from vdnn.reproduction.differences import Difference, differences, summaries
from vdnn.reproduction.networks import NETWORKS
from vdnn.reproduction.numbers import numbers_of
from vdnn.reproduction.page import readme_table, write_figures

__all__ = ["NETWORKS", "Difference", "differences", "numbers_of", "readme_table", "summaries", "write_figures"]
