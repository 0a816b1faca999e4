"""Conversion between formats, resumable and parallel over ranks and worker processes.

In: a source of samples and a target folder. Out: the folder complete with its manifest, or journals of what
    is finished,
from which the same command resumes.
"""
