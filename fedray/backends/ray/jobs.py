"""Jobs of a Ray cluster: submitted, listed, followed and stopped through Ray's job API."""

import asyncio
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from fedray.errors import ConfigError, FedrayError

if TYPE_CHECKING:
    from fedray.submit import Job

_MODULES = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
for _module in _MODULES:
    logging.getLogger(f"ray.{_module}").setLevel(logging.ERROR)  # they tell of each package and each connection

Tell = Callable[[str], None]

ANSWER = 20.0  # seconds for a cluster to answer
STOPPED = 60.0  # seconds for a job to end once it is told to; Ray kills what does not end by itself
PENDING = 10.0  # seconds for one that has not begun
_ASKED = 0.5  # seconds between questions about a job


@dataclass(frozen=True)
class Listed:
    """A job that fedray has submitted, as the cluster knows it; ``exit_code`` is its driver's, once it has ended."""

    id: str
    status: str
    name: str
    out: str
    version: str
    started: float
    message: str
    exit_code: int | None

    @property
    def ended(self) -> bool:
        """Whether it is over, one way or another."""
        return JobStatus(self.status).is_terminal()


class Jobs:
    """The jobs of a cluster.

    Args:
        address: The cluster's dashboard, such as ``http://head:8265``; None for ``RAY_API_SERVER_ADDRESS`` or, without
            it, ``RAY_ADDRESS``.

    Raises:
        ConfigError: no cluster is named, none is there, or it does not accept the token.
    """

    def __init__(self, address: str | None = None) -> None:
        with _address(address) as self.address:
            _knock(self.address)
            with _explained(self.address):
                self._client = JobSubmissionClient(self.address)

    def submit(self, job: "Job") -> str:
        """Hand a job over; returns its id.

        Raises:
            FedrayError: the cluster refuses it.
        """
        options: dict[str, Any] = {"entrypoint_num_cpus": job.cpus} if job.cpus else {}
        if job.labels:
            if "entrypoint_label_selector" not in inspect.signature(self._client.submit_job).parameters:
                raise ConfigError("this version of Ray cannot choose a job's node by labels; leave --label out")
            options["entrypoint_label_selector"] = dict(job.labels)
        runtime_env = {
            "working_dir": str(job.folder),
            "py_modules": [str(package) for package in job.packages],
            "env_vars": dict(job.env),
        }
        with _explained(self.address):
            return str(
                self._client.submit_job(
                    entrypoint=job.command,
                    submission_id=job.id,
                    runtime_env={key: value for key, value in runtime_env.items() if value},
                    metadata=dict(job.metadata),
                    **options,
                )
            )

    def all(self) -> list[Listed]:
        """What fedray has submitted, oldest first."""
        with _explained(self.address):
            found = [_listed(details) for details in self._client.list_jobs() if _ours(details)]
        return sorted(found, key=lambda job: job.started)

    def find(self, id: str) -> Listed:
        """A job by its id.

        Raises:
            ConfigError: there is none that fedray has submitted.
        """
        with _explained(self.address, f"there is no job {id!r} at {self.address}"):
            details = self._client.get_job_info(id)
        if not _ours(details):
            raise ConfigError(f"the job {id!r} at {self.address} is none of fedray's; `ray job` deals with it")
        return _listed(details)

    def logs(self, id: str) -> str:
        """All that a job has printed so far."""
        self.find(id)
        with _explained(self.address):
            return str(self._client.get_job_logs(id))

    def follow(self, id: str, write: Tell, tell: Tell) -> Listed:
        """Write what a job prints until it ends; ``tell`` says why it has not begun."""
        told = ""
        while (job := self.find(id)).status == JobStatus.PENDING:
            if job.message != told:
                told = job.message
                tell(f"waiting: {told}")
            time.sleep(_ASKED)

        async def tail() -> None:
            async for text in self._client.tail_job_logs(id):
                write(text)

        with _explained(self.address):
            asyncio.run(tail())
        return self._end(id)

    def stop(self, id: str) -> Listed:
        """Tell a job to end, and wait until it has; one that has ended already stays as it is."""
        if not self.find(id).ended:
            with _explained(self.address):
                self._client.stop_job(id)
        return self._end(id)

    def _end(self, id: str) -> Listed:
        began = time.monotonic()
        while not (job := self.find(id)).ended:
            if time.monotonic() > began + (PENDING if job.status == JobStatus.PENDING else STOPPED):
                raise FedrayError(f"job {id} is still {job.status} ({job.message}); ask with: fedray jobs status {id}")
            time.sleep(_ASKED)
        return job


def _ours(details: JobDetails) -> bool:
    return "fedray" in (details.metadata or {})


def _listed(details: JobDetails) -> Listed:
    known = details.metadata or {}
    return Listed(
        id=str(details.submission_id),
        status=str(details.status.value),
        name=known.get("name", ""),
        out=known.get("out", ""),
        version=known.get("fedray", ""),
        started=(details.start_time or 0) / 1000,
        message=" ".join((details.message or "").split()),
        exit_code=details.driver_exit_code,
    )


@contextmanager
def _address(given: str | None) -> Iterator[str]:
    """The cluster's address; for as long as Ray reads it, in the environment too, which Ray lets win."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    address = given or before or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ConfigError(f"no cluster is named; give --address http://HOST:8265, or set {name}")
    if "://" not in address and (given or before):
        address = f"http://{address}"
    elif "://" not in address or address.startswith("ray://"):
        from ray.dashboard.utils import get_address_for_submission_client

        try:
            address = get_address_for_submission_client(address)
        except Exception as error:  # of many kinds
            raise ConfigError(
                f"RAY_ADDRESS is {address}, and no cluster answers there ({_short(error)}); set {name} to the address "
                "of its dashboard, such as http://head:8265"
            ) from None
    os.environ[name] = address.rstrip("/")
    try:
        yield os.environ[name]
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _knock(address: str) -> None:
    """Whether there is anybody, within `ANSWER` seconds; Ray's own client would wait for ever."""
    if not address.startswith(("http://", "https://")):
        return  # Ray asks a module of that name where the cluster is
    try:
        requests.get(f"{address}/api/version", timeout=ANSWER)
    except requests.exceptions.SSLError as error:
        raise ConfigError(f"{address} has no certificate that is trusted here ({_short(error)})") from None
    except (requests.exceptions.RequestException, ValueError) as error:
        raise ConfigError(
            f"there is no Ray cluster at {address} ({_short(error)}); is its dashboard running, and within reach?"
        ) from None


@contextmanager
def _explained(address: str, unknown: str | None = None) -> Iterator[None]:
    """What Ray's client raises, on one line."""
    try:
        yield
    except AuthenticationError as error:
        refused = str(error).startswith("Authentication failed")
        what = f"{address} does not accept this token" if refused else f"{address} asks for a token"
        raise ConfigError(
            f"{what}; set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or its file in "
            "RAY_AUTH_TOKEN_PATH"
        ) from None
    except (RuntimeError, ConnectionError, requests.exceptions.RequestException, ValueError) as error:
        if isinstance(error, FedrayError):
            raise
        if unknown and "404" in str(error):
            raise ConfigError(f"{unknown}; `fedray jobs` lists those that there are") from None
        raise FedrayError(f"the cluster at {address} answers: {_short(error)}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
