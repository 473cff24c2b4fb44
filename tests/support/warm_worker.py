"""python -I -S warm_worker.py default_worker.py FLAGS: a Ray worker as a child of `warm.py`.

Ray starts this in the place of Python. It hands its command line, environment and streams to the
server, and ends as the child does; if Ray ends it or ends itself, the server ends the child.
"""

import array
import ctypes
import json
import os
import socket
import sys

WORKERS_AT = "ARENA_TEST_WORKERS_AT"
# Flags for Ray's setup_worker.py, which starts the worker in the environment that a run asks for.
OF_SETUP = ("--language=", "--serialized-runtime-env-context=")


# Of prctl(2): the signal to get when the parent ends.
PR_SET_PDEATHSIG, SIGKILL = 1, 9


def main() -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    request = {
        "argv": [flag for flag in sys.argv[2:] if not flag.startswith(OF_SETUP)],
        "script": sys.argv[1],
        "env": dict(os.environ),
        "cwd": os.getcwd(),
        "is_worker": True,
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ[WORKERS_AT])
        streams = array.array("i", [1, 2])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        server.sendmsg([json.dumps(request).encode()], rights)
        answers = b""
        while answers.count(b"\n") < 2:
            piece = server.recv(4096)
            if not piece:
                return 1
            answers += piece
    code = int(answers.split(b"\n")[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
