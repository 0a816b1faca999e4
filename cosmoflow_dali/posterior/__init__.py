"""Posteriors of the parameters: summaries of a universe, their compression, normalizing flows, calibration.

In: counts (B, n, n, n, C) int16 and targets (B, 4) in [-1, 1], as arrays. Out: log-densities and draws
of the parameters, and a verdict on their calibration. Nothing here reads a file.
"""
