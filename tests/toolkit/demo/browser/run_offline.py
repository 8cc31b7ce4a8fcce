"""`run_offline.py PROGRAM ARGS`: runs a program that can reach no other machine; what it tried stands on stderr."""

import os
import runpy
import signal
import sys


LOCAL = ("127.", "::1", "localhost", "0.0.0.0")


def refuse(event: str, args: tuple):
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else None  # a path: of this machine
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host and not host.startswith(LOCAL):
        os.write(2, f"OUTSIDE {event} {host}\n".encode())
        raise OSError(f"{host} cannot be reached")


sys.addaudithook(refuse)
# A shell that runs the tests in the background has its programs ignore Ctrl+C.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
