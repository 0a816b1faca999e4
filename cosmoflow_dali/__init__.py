"""The trainer: networks, training step, training loop, reports and MLPerf results.

In: a folder of samples and a configuration. Out: a run folder with a trained network and its report.
"""

from pipelines.console import prepare_program

__version__ = "0.2.0.dev0"

prepare_program()
