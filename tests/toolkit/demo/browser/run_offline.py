"""`run_offline.py MODULE ARGS`: runs a module that cannot reach other machines, and reports each try on stderr."""

import os
import runpy
import signal
import sys


LOCAL = ("127.", "::1", "localhost", "0.0.0.0")


def refuse(event: str, args: tuple):
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else None  # a path, which is on this machine
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host and not host.startswith(LOCAL):
        os.write(2, f"OUTSIDE {event} {host}\n".encode())
        raise OSError(f"{host} cannot be reached")


sys.addaudithook(refuse)
# Programs ignore Ctrl+C if a shell runs the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
