"""Which Ray cluster a run uses: its own on this machine, or an existing one."""

import logging
import signal
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

import fedray
from fedray.errors import FedrayError


@contextmanager
def connected(
    address: str, object_store_gb: float | None, num_cpus: int | None = None, num_gpus: int | None = None
) -> Iterator[None]:
    """Be connected to a cluster for a while; one that is there already (a job, a Tune trial) is used and left.

    ``local`` starts one of our own, and never joins one that somebody else started.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "include_dashboard": False,
        "object_store_memory": int(object_store_gb * 2**30) if object_store_gb else None,
    }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address, namespace="fedray", logging_level=logging.ERROR, **(options if address == "local" else {})
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise FedrayError(
            f"cannot use the Ray cluster at {address!r} ({' '.join(str(error).split())[:300]}); is it running, and are "
            "RAY_AUTH_MODE and its token set as there? backend.address=local starts one for this run"
        ) from error
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, which ends the process at once
    try:
        yield
    finally:
        ray.shutdown()


def carry_users_modules() -> None:
    """Let modules that nobody installed (a script's neighbours) travel by value: workers need no copy of the files."""
    targets = [path for path in sys.path if any(Path(path).glob("*.dist-info"))]  # of pip install --target, for example
    installed = {Path(path).resolve() for path in (*sysconfig.get_paths().values(), *targets, *fedray.__path__)}
    for module in list(sys.modules.values()):
        file = str(getattr(module, "__file__", None) or "")
        if file and module.__name__ != "__main__" and installed.isdisjoint(Path(file).resolve().parents):
            ray.cloudpickle.register_pickle_by_value(module)
