"""Many devices and many processes.

sharding.py     the device mesh and the sharding of every array
distributed.py  starts the processes of a run; barriers, agreement, joint stop
peers.py        detects that another process failed or died
relay.py        a process between this one and the coordinator; it survives both
"""
