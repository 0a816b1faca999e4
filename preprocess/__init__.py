"""Programs that make, convert, check, download and stage data sets.

In: a simulator's settings, HDF5 universes, or samples in any format. Out: folders of samples to train from.
"""

import os
import sys

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
