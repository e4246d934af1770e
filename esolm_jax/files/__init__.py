"""Files that others may have damaged, planted or locked.

regular_file.py   opens and reads untrusted files within bounds
hashing.py        hash of a file: SHA-256 or XXH3-128
workdir_lock.py   one writer at a time in a folder
lease.py          the process that holds a lock
shared_locks.py   whether all hosts see the locks of a file system
"""
