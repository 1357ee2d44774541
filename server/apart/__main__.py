"""The program of the engine's process: `python -m server.apart`, which `front` starts with two ends of sockets.

Owns what has to be so before anything is imported. A signal to end is the front's, which a terminal and a service's
supervisor send to both: the front drains what runs, and this process ends when the front tells it to or is gone.
"""

import signal
import sys

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    from server.ground.heap import keep_one_arena

    keep_one_arena()  # before anything starts a thread

    from server.apart.child import run

    run(*map(int, sys.argv[1:]))
