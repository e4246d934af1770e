"""Suites: the perplexities of a model on several data sets, in one run.

suite_file.py   Suite and DataSet, read from TOML; zeroshot.toml is the zero-shot table
suite_data.py   the files of each data set under --data_root, prepared on first use
suite_run.py    evaluates what is not done yet
suite_report.py table, JSON, and a plot beside published figures
"""
