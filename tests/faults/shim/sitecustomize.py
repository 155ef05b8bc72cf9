"""Faults for the commands that the campaigns start, by environment variable; on PYTHONPATH there, never in the product.

SLOW_FSYNC=SECONDS     every fsync takes so much longer: a slow disk, on which a kill often falls inside a save
FORBID=pickle,network  unpickling and connecting raise, as a program that must need neither is run
"""

import os
import time

if "SLOW_FSYNC" in os.environ:
    _fsync = os.fsync

    def fsync(descriptor):
        time.sleep(float(os.environ["SLOW_FSYNC"]))
        _fsync(descriptor)

    os.fsync = fsync

if "pickle" in os.environ.get("FORBID", ""):
    import pickle

    def refuse(*_, **__):
        raise RuntimeError("FORBIDDEN: unpickling")

    pickle.load = pickle.loads = refuse
    pickle.Unpickler = type("Unpickler", (pickle.Unpickler,), {"load": refuse})  # which libraries inherit from

if "network" in os.environ.get("FORBID", ""):
    import socket

    _connect = socket.socket.connect

    def connect(self, address):
        if self.family != socket.AF_UNIX:
            raise RuntimeError(f"FORBIDDEN: connecting to {address}")
        return _connect(self, address)

    def look_up(*arguments, **_):
        raise RuntimeError(f"FORBIDDEN: looking up {arguments[0]}")

    socket.socket.connect, socket.getaddrinfo = connect, look_up
