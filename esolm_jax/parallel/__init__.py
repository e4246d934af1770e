"""Many devices and many processes.

sharding.py     the device mesh and the sharding of every array
launcher.py     the process index and count from the environment
coordinator.py  the coordinator's address, and connecting to it
distributed.py  start and end of a run's processes, and their numbers
multihost.py    barriers, and values that processes agree on
program_cache.py    one cache of compiled programs for all processes, or none
stored_programs.py  compiled programs that are found without being traced
stop_signal.py  SIGTERM and SIGINT end training after a step in all processes
guard.py        announces a failure to the other processes and ends this one
peers.py        detects that another process failed or died
relay.py        a process between this one and the coordinator; it survives both
"""
