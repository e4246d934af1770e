"""The evaluation report: evaluate --report.

window_sums.py   one pass over a data set: sums of the bound and of the predicted distributions
statistics.py    figures from these sums, with jackknife errors
report_run.py    the data sets and provenance of a report
report_page.py   report.md, report.json and report.png
"""
