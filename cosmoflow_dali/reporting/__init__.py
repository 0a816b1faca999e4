"""The end of a run, for people: predictions, ridge baseline, summary.json and report.html.

In: a finished run. Out: files in its run folder.
"""
