"""Files that others may have damaged, planted or locked.

regular_file.py   opens and reads untrusted files within bounds
hashing.py        SHA-256 of a file
workdir_lock.py   one writer at a time in a folder
"""
