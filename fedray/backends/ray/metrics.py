"""What a run tells Prometheus, through Ray's own metrics endpoint of each node."""

from collections.abc import Mapping
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

METRICS: dict[str, tuple[Literal["counter", "gauge", "histogram"], str]] = {
    "fedray_rounds": ("counter", "Rounds done."),
    "fedray_clients": ("counter", "Clients whose updates were used."),
    "fedray_clients_failed": ("counter", "Clients that failed, were late, or left."),
    "fedray_bytes_up": ("counter", "Bytes that a federation would have sent to the server."),
    "fedray_bytes_down": ("counter", "Bytes that a federation would have sent to the clients."),
    "fedray_generated_samples": ("counter", "Synthetic samples made."),
    "fedray_worker_deaths": ("counter", "Workers that died and were started again."),
    "fedray_workers": ("gauge", "Workers that are up."),
    "fedray_round": ("gauge", "The newest round."),
    "fedray_test_accuracy": ("gauge", "Test accuracy of the newest evaluation."),
    "fedray_train_loss": ("gauge", "Mean training loss of the newest round."),
    "fedray_round_seconds": ("histogram", "Wall-clock seconds of a round."),
}
_BOUNDARIES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
_KINDS: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Meter:
    """The metrics of one run, by its name."""

    def __init__(self, run: str) -> None:
        self._made = {}
        for name, (kind, description) in METRICS.items():
            more = {"boundaries": _BOUNDARIES} if kind == "histogram" else {}
            self._made[name] = _KINDS[kind](name, description=description, tag_keys=("run",), **more)
            self._made[name].set_default_tags({"run": run})

    def tell(self, record: Mapping[str, Any], workers: int, deaths: int) -> None:
        """Count a round from its line in the metrics; ``deaths`` are those of workers since the last call."""
        sampled, failed = record.get("clients_sampled", 0), record.get("clients_failed", 0)
        counts = {"fedray_rounds": int(record["round"] > 0), "fedray_clients": sampled - failed}
        counts |= {"fedray_clients_failed": failed, "fedray_worker_deaths": deaths}
        counts |= {"fedray_generated_samples": record.get("synthetic_samples", 0)}
        counts |= {f"fedray_bytes_{way}": record.get(f"bytes_{way}", 0) for way in ("up", "down")}
        for name, count in counts.items():
            if count > 0:
                self._made[name].inc(count)
        levels = {"fedray_workers": workers, "fedray_round": record["round"]}
        levels |= {f"fedray_{key}": record[key] for key in ("test_accuracy", "train_loss") if key in record}
        for name, level in levels.items():
            self._made[name].set(level)
        self._made["fedray_round_seconds"].observe(record["seconds"])
