"""The trainer: networks, training step, training loop, reports and MLPerf results.

In: a folder of samples and a configuration. Out: a run folder with a trained network and its report.
"""

__version__ = "0.2.0.dev0"
