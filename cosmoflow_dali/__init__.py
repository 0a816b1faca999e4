"""The trainer: networks, training step, training loop, reports and MLPerf results.

In: a folder of samples and a configuration. Out: a run folder with a trained network and its report.
"""

import os
import sys

__version__ = "0.2.0.dev0"

# `python -m` looks for modules in the working folder first: a user's yaml.py would be taken for the library.
if (
    sys.argv[:1] == ["-m"]
    and f" -m {__name__}." in " ".join(sys.orig_argv)
    and not getattr(sys.flags, "safe_path", sys.flags.isolated)
    and sys.path[0] != os.path.dirname(__path__[0])
):
    del sys.path[0]
    # For the processes that this one starts.
    os.environ["PYTHONSAFEPATH"] = "1"

from pipelines.console import prepare_program

prepare_program()
