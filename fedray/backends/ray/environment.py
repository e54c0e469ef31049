"""What Ray reads from the environment when it is imported; this module is therefore used before it is."""

import os
import secrets


def prepare(address: str) -> None:
    """Make Ray of this process and its children private and quiet.

    A local cluster listens on the loopback interface only, and asks for a token that only this process and its
    children know. What the user has set in the environment stays as it is.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 starves workers on a busy machine
        # or glibc would give memory back that a thread has freed, whatever `keep_freed_memory` says
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
