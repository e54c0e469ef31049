"""The raw samples of `speed.py` as a Markdown table, and whether all contenders computed the same."""

from statistics import median
from typing import Any

from work import Work

Record = dict[str, Any]

TOLERANCE = {"cnn": 5e-3, "mlp": 2e-3}  # of the loss: training amplifies the order of sums, in the loops as well
COLUMNS = ("work", "contender", "s a round", "least", "most", "÷ floor2", "first round done, s", "memory, MB", "loss")


def table(records: list[Record]) -> str:
    """A line for each work and contender: its median round over all timed processes, but for their first rounds.

    The ratio to floor2 is the median (least to most) over the repeats, each the ratio of two medians.
    """
    lines = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2))]
    for work, group in grouped(records).items():
        for name in dict.fromkeys(record["contender"] for record in group):
            own, floor = ([r for r in group if r["contender"] == wanted] for wanted in (name, "floor2"))
            lines.append((str(work), name, *numbers(own, floor)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def numbers(own: list[Record], floor: list[Record]) -> list[str]:
    timed = [record for record in own if not record["peak_pss"]]
    seconds = sorted(second for record in timed for second in counted(record))
    bases = {record["repeat"]: median(counted(record)) for record in floor}
    ratios = sorted(median(counted(r)) / bases[r["repeat"]] for r in timed if r["repeat"] in bases)
    peaks = [record["peak_pss"] / 1e6 for record in own if record["peak_pss"]]
    return [
        *((f"{value:.4g}" for value in (median(seconds), seconds[0], seconds[-1])) if seconds else ("",) * 3),
        f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else "",
        f"{median(record['startup'] for record in timed):.1f}" if timed else "",
        f"{max(peaks):.0f}" if peaks else "",
        f"{list(own[-1]['losses'].values())[-1]:.6f}",
    ]


def counted(record: Record) -> list[float]:
    """Seconds of the rounds, but for the first one, if there are more."""
    return record["seconds"][1:] or record["seconds"]


def disagreements(records: list[Record]) -> list[str]:
    """A line for each contender whose loss differs from that of the first one at the same work, after any round."""
    problems = []
    for work, (first, *others) in grouped(records).items():
        tolerance = TOLERANCE.get(work.model, 1e-6)
        for other in others:
            for round, loss in other["losses"].items():
                expected = first["losses"].get(round, float("nan"))
                if not abs(loss - expected) <= tolerance * abs(expected):
                    problems.append(
                        f"{work}: after round {round} the loss of {other['contender']} (repeat {other['repeat']}) is "
                        f"{loss}, that of {first['contender']} {expected}: they did not do the same work"
                    )
    return problems


def grouped(records: list[Record]) -> dict[Work, list[Record]]:
    groups: dict[Work, list[Record]] = {}
    for record in records:
        groups.setdefault(Work(**record["work"]), []).append(record)
    return groups
