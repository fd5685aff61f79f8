"""An engine process, begun.

Nothing is imported here that takes time: the process loads what it needs, torch above all, while the front does so too.
"""

import os
import socket
import subprocess
import sys

#: Else, on some processors, how MKL rounds depends on where a learner lies in a stack: it would show in replay.
_REPEATABLE_PRODUCTS = {"MKL_CBWR": "AUTO,STRICT"}


class SpawnedEngine:
    """A process that waits for its options, until the front's end of the connection is closed.

    Attributes:
        process: to be waited for.
        connection: the front's end.
        taken: whether somebody speaks to it, who then ends it.
    """

    def __init__(self) -> None:
        self.taken = False
        self.connection, theirs = socket.socketpair()
        with theirs:
            # A session of its own, so that Ctrl-C in a terminal reaches the front alone.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cbp_server.engine", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], start_new_session=True, env=_REPEATABLE_PRODUCTS | os.environ,
            )  # fmt: skip

    def end(self) -> None:
        """Ends a process that nobody has spoken to; leaves any other alone."""
        if self.taken:
            return
        self.connection.close()
        self.process.kill()
        self.process.wait()
