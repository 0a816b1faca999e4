"""MLPerf HPC: the events that a run logs, and the scores and submissions made from logs.

In: a run's settings, or the MLPerf logs of any program. Out: log events; scores, checker verdicts and a
submission folder.
"""
