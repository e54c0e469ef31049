"""The training loop with everything that a run folder holds; the same wherever it runs."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedray import checkpoint
from fedray.algorithm import FederatedAlgorithm
from fedray.evaluation import evaluate
from fedray.experiment import Experiment
from fedray.learner import Learner, Task
from fedray.ledger import Ledger, MeteredBackend
from fedray.rounds import rounds
from fedray.samplers import Selection

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def train(
    experiment: Experiment, folder: Path, backend: Any, stop: Callable[[], bool] = lambda: False
) -> Iterator[Record]:
    """Train from the newest checkpoint in ``folder``, or from the start; yield each round's record once it is kept.

    A checkpoint is written by a thread while the next round trains; what the loop had to wait for it stands in the
    record of the round after.

    Args:
        experiment: What to do.
        folder: The run's folder, which exists.
        backend: Where clients run.
        stop: Asked between rounds; once it is true, a checkpoint is written and the loop ends.
    """
    began = time.perf_counter()
    state = _initial_state(experiment.algorithm, experiment.task)
    ledger, done = Ledger(), 0
    found = checkpoint.read_newest(folder, state)
    if found is not None:
        done, state = found.round, found.state
        ledger = Ledger(up_total=found.progress["bytes_up_total"], down_total=found.progress["bytes_down_total"])
        backend.client_states.clear()
        backend.client_states.committed |= {
            client: (at, backend.store(kept)) for client, (at, kept) in found.clients.items()
        }
    metrics_path = folder / "metrics.jsonl"
    _forget_after(metrics_path, done if found is not None else -1)
    checkpoint.forget_after(folder, done if found is not None else -1)

    def save(number: int, state: Any, clients: dict[int, tuple[int, Any]], progress: dict[str, Any]) -> None:
        checkpoint.write(folder, number, state, clients, backend.fetch, progress, experiment.keep_checkpoints)

    def test(number: int) -> dict[str, float]:
        metrics, details = evaluate(experiment.task, state.params, backend)
        if pictures := details.pop("pictures", None):
            checkpoint.write_sheet(folder, number, pictures)
        checkpoint.replace_file(folder / "evaluation.json", _json({"round": number, **details}).encode())
        return metrics

    def profile() -> dict[str, Any]:
        return {"profile": backend.clock.take()} if experiment.profile else {}

    if found is None and experiment.evaluate_every:
        record: Record = {"round": 0, **test(0), **ledger.entry(), "seconds": time.perf_counter() - began}
        yield _keep(metrics_path, {**record, **profile()})

    loop = rounds(
        experiment.algorithm,
        state,
        MeteredBackend(backend, ledger, experiment.diversity),
        experiment.population,
        experiment.cohort,
        experiment.sampler,
        experiment.seed,
        start=done,
        select=experiment.select(state.params),
    )
    saved = done if found is not None else None
    between: dict[str, float] = {}  # seconds since the last line that are in no line yet
    with _Aside() as writer:
        while done < experiment.rounds and not stop():
            began = time.perf_counter()
            writer.check()
            ledger.open_round()
            finished = next(loop)
            done, state, phases = finished.number, finished.state, {**finished.phases, **between}
            failed = int(finished.metrics.get("clients_failed", 0)) + len(finished.selection.dropped)
            ledger.book_dropped(len(finished.selection.dropped))
            sampled = len(finished.selection.clients) + len(finished.selection.dropped)
            last = done == experiment.rounds
            tested: dict[str, float] = {}
            if "test_loss" in finished.metrics:  # of models that only the algorithm has
                (folder / "evaluation.json").unlink(missing_ok=True)
            elif last or (experiment.evaluate_every and done % experiment.evaluate_every == 0):
                start = time.perf_counter()
                tested = test(done)
                phases["evaluate"] = time.perf_counter() - start
            record = {"round": done, **tested, **finished.metrics, "clients_sampled": sampled, "clients_failed": failed}
            record |= _in_virtual_time(finished.selection, ledger)
            seconds = time.perf_counter() - began + sum(between.values())
            record |= {**ledger.entry(), "seconds": seconds, "phases": phases, **profile()}
            if lost := backend.dropped:
                record["dropped"] = [{"client": f.client, "why": f.why} for f in sorted(lost, key=lambda f: f.client)]
                backend.dropped.clear()
            _keep(metrics_path, record)
            between = {}
            if last or (experiment.checkpoint_every and done % experiment.checkpoint_every == 0):
                start = time.perf_counter()
                # after the line: whoever dies between the two runs the round again, and writes the line again
                writer.start(save, done, state, dict(backend.client_states.committed), ledger.entry())
                saved = done
                if experiment.lockstep:
                    writer.check(wait=True)
                between = {"checkpoint": time.perf_counter() - start}
            yield record
        if saved != done:
            writer.start(save, done, state, dict(backend.client_states.committed), ledger.entry())
    if done == experiment.rounds:
        checkpoint.write_params(folder / "model.safetensors", state.params)


def _in_virtual_time(selection: Selection, ledger: Ledger) -> Record:
    """What a schedule has to say about a round."""
    if selection.finished is None:
        return {}
    assert selection.traffic is not None
    everybody = len(selection.clients) + len(selection.dropped)
    for way, counted, sent, clients in (
        ("up", selection.traffic[0], ledger.up, len(selection.clients)),
        ("down", selection.traffic[1], ledger.down, everybody),
    ):
        if abs(sent - counted * clients) > 0.01 * sent:
            logger.warning(
                "the schedule's time is that of %d bytes %s for each client; they move %d: set schedule.bytes_%s=%d",
                *(counted, way, sent / clients, way, sent / clients),
            )
    stale = {"staleness": sum(selection.staleness) / len(selection.staleness)} if selection.staleness else {}
    return {"virtual_seconds": selection.finished, **selection.told, **stale}


class _Aside:
    """A thread that does one thing at a time; whoever starts the next one, or leaves, waits for it."""

    def __init__(self) -> None:
        self._thread, self._running = ThreadPoolExecutor(1, "checkpoint"), Future[None]()
        self._running.set_result(None)

    def start(self, do: Callable[..., None], *arguments: Any) -> None:
        self._running.result()
        self._running = self._thread.submit(do, *arguments)

    def check(self, wait: bool = False) -> None:
        """Raise what went wrong, if it is known by now, or wait for it."""
        if wait or self._running.done():
            self._running.result()

    def __enter__(self) -> "_Aside":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._running.result()


def _initial_state(algorithm: FederatedAlgorithm, task: Task) -> Any:
    return algorithm.init({name: tensor.cpu() for name, tensor in Learner(task, "cpu").params().items()})


def _keep(path: Path, record: Record) -> Record:
    """Add a line to the metrics."""
    with path.open("a") as file:
        file.write(_json(record) + "\n")
    return record


def _json(value: Any) -> str:
    """JSON proper, which knows neither NaN nor infinity: null stands for them."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False)


def _forget_after(path: Path, round: int) -> None:
    """Drop the lines of rounds that will be run again, and a last line that a crash cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["round"] <= round:
                kept.append(line + "\n")
        except ValueError:
            break
    checkpoint.replace_file(path, "".join(kept).encode())
