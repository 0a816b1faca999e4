"""MLPerf HPC: the log events of a run, and results and submissions made from the logs of many.

In: the settings of a run, or logs of anyone's runs. Out: events in the rules' terms; scores, checker verdicts
and a submission folder.
"""
