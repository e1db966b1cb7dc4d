"""An experiment: a TOML file says what to run, `results/<name>/` holds what came of it.

spec      the file, read and checked before anything starts
runner    runs what is not there yet, one file a run
page      tables and figures, from the files alone
"""

from vdnn.experiment.page import write_page
from vdnn.experiment.runner import run_missing
from vdnn.experiment.spec import Experiment, read_experiment

__all__ = ["Experiment", "read_experiment", "run_missing", "write_page"]
