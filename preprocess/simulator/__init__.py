"""Simulated universes: linear theory, a particle-mesh N-body code, and the samples cut from its boxes.

In: `SimulateConfig` and a seed. Out: samples of int16 counts at four redshifts, with targets.
"""
