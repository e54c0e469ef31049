"""The command line in a process of its own."""

import os
import subprocess
import sys


def command(*arguments) -> subprocess.Popen:
    """``fedray ...`` in a new session, with a Ray of its own: it shares no token with the tests' one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    return subprocess.Popen(
        [sys.executable, "-m", "fedray", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
