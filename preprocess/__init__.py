"""Programs that make, convert, check, download and stage data sets.

In: a simulator's settings, HDF5 universes, or samples in any format. Out: folders of samples to train from.
"""

from pipelines.console import prepare_program

prepare_program()
