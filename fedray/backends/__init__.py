"""Where clients run, and where the training loop does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedray.algorithm import Make, Pool

if TYPE_CHECKING:
    from fedray.backends.ray.resources import Resources
    from fedray.experiment import Experiment

Stop = Callable[[], bool]
Stream = Callable[[Make, Sequence[Any], Pool | None], Iterator[tuple[int, Any]]]


@dataclass(frozen=True)
class Launcher:
    """How an experiment is set going: ``launch(experiment, folder, stop)`` yields a metrics record a round.

    ``stop`` is asked between rounds; once it says so, the loop writes a checkpoint and ends.
    ``stream(make, items, pool)`` is `fedray.algorithm.Backend.stream` without any experiment.
    """

    launch: Callable[["Experiment", Path, Stop], Iterator[dict[str, Any]]]
    stream: Stream


def in_process(
    *,
    num_shares: int = 1,
    device: str = "auto",
    threads: int = 1,
    on_client_error: Literal["raise", "drop"] = "raise",
) -> Launcher:
    """Every client in turn in this process; for debugging, and the yardstick of what a cluster computes.

    Args:
        num_shares: Split and merge the cohort as this many workers would.
        device: auto, cpu, cuda, cuda:1 ...
        threads: PyTorch threads; more are faster for large models, and change the bits of the result.
        on_client_error: Whether a client that raises ends the run, or is dropped from the round and counted.
    """
    _positive(num_shares=num_shares, threads=threads)
    _check_device(device, here=True)

    def launch(experiment: "Experiment", folder: Path, stop: Stop) -> Iterator[dict[str, Any]]:
        from fedray.backends.serial import SerialBackend
        from fedray.training import train

        backend = SerialBackend(experiment.task, num_shares, device, threads, on_client_error, experiment.execution)
        yield from train(experiment, folder, backend, stop)

    def stream(make: Make, items: Sequence[Any], pool: Pool | None) -> Iterator[tuple[int, Any]]:
        from fedray.backends.serial import in_turn
        from fedray.hardware import device_of

        yield from in_turn(make, items, str(device_of(device)))

    return Launcher(launch, stream)


def on_ray(
    *,
    num_workers: int | Literal["auto"] = "auto",
    clients_per_worker: int | Literal["auto"] = "auto",
    min_workers: int | None = None,
    num_cpus: float = 1.0,
    num_gpus: float | Literal["auto"] = "auto",
    labels: list[str] | None = None,
    address: str = "local",
    placement: Literal["pack", "spread"] = "pack",
    device: str = "auto",
    threads: int = 1,
    on_client_error: Literal["raise", "drop"] = "raise",
    client_timeout: float | None = None,
    object_store_gb: float | None = None,
    start_timeout: float = 120.0,
) -> Launcher:
    """A driver actor and worker actors on a Ray cluster; each worker stands for many clients.

    Args:
        num_workers: Worker actors; auto for one for each free GPU or, without GPUs, each num_cpus free CPUs, and for
            more of them when there is room, for example on nodes that join.
        clients_per_worker: Clients of a cohort that a worker stands for, instead of num_workers; 1: an actor for each.
        min_workers: Workers that are enough to begin with; the others join when there is room, for example on nodes
            that an autoscaler brings. null for all.
        num_cpus: CPUs that a worker reserves, fractions allowed.
        num_gpus: GPUs that a worker reserves, fractions allowed; auto for one where the cluster has GPUs.
        labels: Nodes for the workers, by labels such as ray.io/accelerator-type=A100; all of them must fit.
        address: An existing cluster (host:port, or auto), or local for one of this run's own.
        placement: Whether workers fill one node after the other, or are spread over the nodes.
        device: auto, cpu, or cuda.
        threads: PyTorch threads of a worker; more are faster for large models, and change the bits of the result.
        on_client_error: Whether a client that raises ends the run, or is dropped from the round and counted.
        client_timeout: Seconds that a client may take before its worker is ended and the client tried again; one that
            fails so three times counts as a client that raises. null for no limit.
        object_store_gb: Size of a local cluster's shared memory; None for Ray's default.
        start_timeout: Seconds to wait for the workers before saying what is missing.
    """
    _positive(num_cpus=num_cpus, threads=threads, start_timeout=start_timeout)
    counts = {"num_workers": num_workers, "clients_per_worker": clients_per_worker, "min_workers": min_workers}
    for name, value in {**counts, "client_timeout": client_timeout}.items():
        if value is not None and not isinstance(value, str):
            _positive(**{name: value})
    for label in labels or ():
        if not all(label.partition("=")):
            raise ValueError(f"labels holds {label!r}; a label is key=value, such as ray.io/accelerator-type=A100")
    if num_workers != "auto" and clients_per_worker != "auto":
        raise ValueError(
            f"clients_per_worker is {clients_per_worker}, num_workers is {num_workers}; set one of the two"
        )
    if not isinstance(num_gpus, str) and (num_gpus < 0 or (num_gpus > 1 and num_gpus != int(num_gpus))):
        raise ValueError(f"num_gpus is {num_gpus}; it must be a fraction up to 1, or a whole number")
    _check_device(device, here=False)

    def resources() -> "Resources":
        from fedray.backends.ray.resources import Resources

        return Resources(
            num_workers,
            clients_per_worker,
            min_workers,
            num_cpus,
            num_gpus,
            tuple(labels or ()),
            placement,
            device,
            threads,
            on_client_error,
            client_timeout,
            start_timeout,
        )

    def launch(experiment: "Experiment", folder: Path, stop: Stop) -> Iterator[dict[str, Any]]:
        from fedray.backends.ray.environment import prepare

        prepare(address)  # before anything imports ray
        from fedray.backends.ray.driver import drive

        yield from drive(experiment, folder, stop, resources(), address, object_store_gb)

    def stream(make: Make, items: Sequence[Any], pool: Pool | None) -> Iterator[tuple[int, Any]]:
        from fedray.backends.ray.environment import prepare

        prepare(address)
        from fedray.backends.ray.pool import alone

        yield from alone(make, items, pool, resources(), address, object_store_gb)

    return Launcher(launch, stream)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be > 0")


def _check_device(device: str, here: bool) -> None:
    if device == "auto":
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(
            f"device is {device!r}; it must be auto, cpu, cuda, or one of several such as cuda:1"
        ) from None
    if here and kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}; there is no such device here: use cpu or auto")


BACKENDS: dict[str, Callable[..., Launcher]] = {"ray": on_ray, "serial": in_process}
