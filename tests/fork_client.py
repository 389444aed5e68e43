"""
What `accelerate launch` starts in place of an interpreter: asks for a fork, passes signals on and ends as the fork ends.

Its environment says where to ask (`FORKS`); the fork's says who launched it (`LAUNCHER_PID`).
"""

import json
import os
import signal
import socket
import struct
import sys

status, its = os.pipe()
environment = {**os.environ, "LAUNCHER_PID": str(os.getppid())}
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as way:
    way.connect(environment.pop("FORKS"))
    request = json.dumps({"arguments": sys.argv[1:], "env": environment}).encode()
    socket.send_fds(way, [request], [its, 1, 2])
os.close(its)
pid = struct.unpack("i", os.read(status, 4))[0]
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = struct.unpack("i", os.read(status, 4))[0]
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
