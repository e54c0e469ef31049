"""A report is made of whatever a run has left, is the same bytes each time, and needs nothing but itself."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedray.errors import DataError
from fedray.report import comparison, read_metrics, read_run, write_report
from fedray.report.compare import (
    AXES,
    Curve,
    curve,
    default_targets,
    difference_rows,
    group_by_seed,
    reach,
    summary_rows,
    target_rows,
)
from fedray.report.figures import curves_svg, line_style, thin

CLASSES = ("cat", "dog", "<b>&$x$")


def make_run(folder: Path, rounds: int = 10, speed: float = 0.1, **options: object) -> Path:
    """A run whose test accuracy is ``speed · round``, with 1 MB up, 1 MB down and 0.5 s a round."""
    folder.mkdir(parents=True)
    config = {"seed": 0, "rounds": 10, "algorithm": {"name": "fedavg", "local_lr": 0.1}, **options}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "note": "</pre><script>"}))
    rng = np.random.default_rng(0)
    np.savez(folder / "partition.npz", label_counts=rng.integers(0, 9, (7, len(CLASSES))), classes=np.array(CLASSES))
    records = [
        {
            "round": number,
            **({"train_loss": 2.0 / number} if number else {}),
            "test_loss": 2.0 / (number + 1),
            "test_accuracy": speed * number,
            "macro_f1": 0.9 * speed * number,
            "clients_sampled": 5 if number else 0,
            "clients_failed": 0,
            "bytes_up": 1e6 if number else 0,
            "bytes_down": 1e6 if number else 0,
            "bytes_up_total": number * 10**6,
            "bytes_down_total": number * 10**6,
            "seconds": 0.5 if number else 0.0,
            "phases": {"train": 0.4, "server": 0.1} if number else {},
            "drift": number**0.5,
        }
        for number in range(rounds + 1)
    ]
    write_metrics(folder, records)
    confusion = [[8, 1, 1], [0, 10, 0], [2, 0, 0]]
    (folder / "evaluation.json").write_text(
        json.dumps({"round": rounds, "classes": list(CLASSES), "confusion": confusion})
    )
    return folder


def write_metrics(folder: Path, records: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


class Page(HTMLParser):
    """What a page has: its tags balanced, its text, and whatever it would load."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.ids: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        self.words += data + "\n"


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "a<b>")


def test_a_profile_is_drawn_if_there_is_one(run, tmp_path):
    assert "worker-seconds" not in Page(write_report([run], tmp_path / "without.html")).words
    records = read_metrics(run / "metrics.jsonl")
    told = {"train": 0.3, "idle": 0.1, "merge": 0.05}
    write_metrics(run, [{**record, "profile": told if record["round"] else {"evaluate": 0.2}} for record in records])
    page = Page(write_report([run], tmp_path / "with.html"))
    assert "What the workers did" in page.words
    legend = page.words[page.words.index("worker-seconds") :].split("\n")
    assert [word for word in legend if word in ("train", "idle", "merge", "evaluate")][:3] == ["idle", "merge", "train"]


def test_the_page_of_one_run_shows_all_of_it(run, tmp_path):
    out = write_report([run], tmp_path / "new" / "report.html")
    assert out == tmp_path / "new" / "report.html"
    page = Page(out)
    for words in (
        "a<b>", "test accuracy", "1.0000", "best 1.0000, round 10", "of 10", "10.0 up, 10.0 down", "0.500 a round",
        "Classes", "precision", "<b>&$x$", "Who held what", "Where the time went", "80.0%", "drift", "local_lr: 0.1",
        '"python": "3.11"', "megabytes sent, up and down", "seconds", "confusion",
    ):  # fmt: skip
        assert words in page.words or words in out.read_text(), words
    assert page.tags.count("svg") == 2 * 2 + 6 + 2 + 1  # legends, curves, confusion and partition, drift
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_the_page_needs_nothing_else_and_runs_nothing(run, tmp_path):
    page = Page(write_report([run], tmp_path / "report.html"))
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(set(page.ids)) >= len({link[1:] for link in page.links if link.startswith("#")})
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_the_same_run_gives_the_same_bytes_whatever_the_style(run, tmp_path):
    import matplotlib

    first = write_report([run], tmp_path / "1.html").read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "red"}):
        second = write_report([run], tmp_path / "2.html").read_bytes()
        assert matplotlib.rcParams["font.size"] == 30
    assert first == second


def test_precision_recall_and_f1(run, tmp_path):
    from sklearn.metrics import precision_recall_fscore_support

    confusion = read_run(run).confusion
    true, predicted = (np.repeat(index.ravel(), confusion.ravel()) for index in np.indices(confusion.shape))
    precision, recall, f1, support = precision_recall_fscore_support(true, predicted, zero_division=0)
    words = Page(write_report([run], tmp_path / "report.html")).words.split("\n")
    for index, name in enumerate(CLASSES):
        expected = [name, *(f"{value:.3f}" for value in (precision[index], recall[index], f1[index]))]
        assert "\n".join([*expected, str(support[index])]) in "\n".join(words)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_an_unfinished_run_has_a_report(kept, run, tmp_path):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:kept], lines[kept][:25]]))
    for name in ("evaluation.json", "environment.json", "partition.npz"):
        (run / name).unlink()
    record = read_run(run)
    assert [one["round"] for one in record.metrics] == list(range(kept))
    words = Page(write_report([run], tmp_path / "report.html")).words
    assert ("has no round yet" if kept == 0 else f"stands at round {kept - 1} of 10") in words
    assert "local_lr" in words


def test_a_diverged_run_has_a_report(run, tmp_path):
    records = read_run(run).metrics
    for record in records[4:]:
        record |= {"train_loss": math.inf, "test_loss": None, "drift": math.nan, "clients_failed": 2}
    write_metrics(run, records)
    page = Page(write_report([run], tmp_path / "report.html"))
    assert "diverged: its train loss is not a finite number in round 4" in page.words
    assert "lost 14 client updates" in page.words
    assert math.isnan(read_run(run).final["test_loss"])
    other = make_run(tmp_path / "whole", seed=1)
    assert "diverged" in Page(write_report([run, other], tmp_path / "both.html")).words


def test_a_run_again_after_a_resume_counts_once(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = json.dumps({"round": 5, "train_loss": 77.0})
    (run / "metrics.jsonl").write_text("\n".join([*lines[:8], again]) + "\n")
    record = read_run(run)
    assert [one["round"] for one in record.metrics] == list(range(8))
    assert record.metrics[5] == {"round": 5, "train_loss": 77.0}


def test_final_is_the_newest_of_everything(run):
    write_metrics(run, [{"round": 1, "test_accuracy": 0.5, "train_loss": 1.0}, {"round": 2, "train_loss": 0.5}])
    assert read_run(run).final == {"round": 2, "test_accuracy": 0.5, "train_loss": 0.5}


def test_what_is_no_run_folder_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, reason in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "empty", "it has no config.yaml"),
    ):
        with pytest.raises(DataError, match=re.escape(f"{folder} is no run folder: {reason}; name a folder")):
            write_report([folder], tmp_path / "report.html")
    with pytest.raises(DataError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [1", r"config\.yaml cannot be read as YAML .*; restore it"),
        ("config.yaml", "- 1", r"config\.yaml holds no configuration"),
        ("environment.json", "{", r"environment\.json is not JSON .*; remove it"),
        ("evaluation.json", "[]", r"evaluation\.json holds no JSON object"),
        ("partition.npz", "PK\x03\x04 cut", r"partition\.npz is corrupt .*; remove it"),
        ("metrics.jsonl", '{"round": 1}\n{"rou\n{"round": 2}\n', r"metrics\.jsonl, line 2, is no record"),
    ],
)
def test_a_corrupt_file_names_itself(name, content, message, run):
    (run / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_run(run)


def test_seeds_of_one_config_share_a_line_with_a_band(tmp_path):
    folders = [make_run(tmp_path / f"fast-s{seed}", speed=0.06 + 0.02 * seed, seed=seed) for seed in range(3)]
    folders.append(make_run(tmp_path / "slow", speed=0.05, algorithm={"name": "fedprox", "mu": 0.1}))
    groups = group_by_seed([read_run(folder) for folder in folders])
    assert [(group.label, len(group.runs)) for group in groups] == [("fast", 3), ("slow", 1)]
    line = curve(groups[0], "test_accuracy")
    np.testing.assert_allclose(line.y, 0.08 * np.arange(11))
    np.testing.assert_allclose(line.low, 0.06 * np.arange(11))
    np.testing.assert_allclose(line.high, 0.10 * np.arange(11))
    np.testing.assert_allclose(line.x["megabytes"], 2.0 * np.arange(11))
    np.testing.assert_allclose(line.x["seconds"], 0.5 * np.arange(11))
    assert curve(groups[1], "test_accuracy").low is None
    assert difference_rows(groups) == [
        ["option", "fast", "slow"],
        ["algorithm.name", "fedavg", "fedprox"],
        ["algorithm.local_lr", "0.1", "–"],
        ["algorithm.mu", "–", "0.1"],
    ]
    page = Page(write_report(folders, tmp_path / "report.html"))
    assert "fast (3 seeds)" in page.words
    assert "0.8000 ± 0.2000" in page.words


def test_seeds_that_stopped_at_different_rounds_are_averaged_where_all_are(tmp_path):
    folders = [make_run(tmp_path / f"s{seed}", rounds=4 + seed, seed=seed) for seed in range(2)]
    (group,) = group_by_seed([read_run(folder) for folder in folders])
    assert group.label == "fedavg"  # the names share nothing but the mark of the seed
    assert curve(group, "test_accuracy").x["rounds"].tolist() == [0, 1, 2, 3, 4]


def test_a_run_and_its_repetition_stay_two_lines(tmp_path):
    folders = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")]
    assert [group.label for group in group_by_seed([read_run(folder) for folder in folders])] == ["x/run", "y/run"]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("a-10", "a-11"), "a"),
        (("a_seed0", "a_seed1"), "a"),
        (("p/0", "p/1"), "p"),
        (("lr0.1-s1", "lr0.1-s2"), "lr0.1"),
        (("method=bias,seed=0", "method=bias,seed=1"), "method=bias"),  # as a sweep calls them
    ],
)
def test_the_label_of_a_group_is_what_its_names_share(names, label, tmp_path):
    runs = [read_run(make_run(tmp_path / "z" / name, seed=seed)) for seed, name in enumerate(names)]
    other = read_run(make_run(tmp_path / "other" / "p" / "0", rounds=1, cohort=3))
    assert group_by_seed([*runs, other])[0].label.rpartition("z/")[2] == label


def test_what_a_target_cost(tmp_path):
    fast, slow = make_run(tmp_path / "fast", speed=0.09), make_run(tmp_path / "slow", speed=0.05, cohort=2)
    runs = [read_run(fast), read_run(slow)]
    assert reach(runs[0], 0.27) == (3.0, 6.0, 1.5, 0.0)
    assert reach(runs[1], 0.51) is None
    assert target_rows(group_by_seed(runs), [0.45, 0.9]) == [
        ["test accuracy", "≥ 0.45", "≥ 0.9"],
        ["fast", "5 rounds, 10.0 MB, 2.50 s", "10 rounds, 20.0 MB, 5.00 s"],
        ["slow", "9 rounds, 18.0 MB, 4.50 s", "not reached"],
    ]
    assert default_targets(runs) == [0.4, 0.5, 0.9]
    assert Page(write_report([fast, slow], tmp_path / "r.html", targets=[0.123])).words.count("≥ 0.123") == 1


def test_a_target_that_only_some_seeds_reach_says_so(tmp_path):
    runs = [read_run(make_run(tmp_path / f"r-s{seed}", speed=0.04 * (1 + seed), seed=seed)) for seed in range(2)]
    assert target_rows(group_by_seed(runs), [0.6])[1][1] == "8 rounds, 16.0 MB, 4.00 s (1 of 2 seeds)"


def test_the_comparison_for_the_terminal(tmp_path):
    runs = [
        read_run(make_run(tmp_path / name, speed=speed, cohort=n))
        for n, (name, speed) in enumerate([("a", 0.09), ("bb", 0.05)])
    ]
    text = comparison(runs, [0.5])
    assert text == "\n".join([
        "run  rounds  accuracy    best  macro F1  test loss  MB up  MB down  seconds",
        "a        10    0.9000  0.9000    0.8100     0.1818   10.0     10.0     5.00",
        "bb       10    0.5000  0.5000    0.4500     0.1818   10.0     10.0     5.00",
        "",
        "test accuracy                       ≥ 0.5",
        "a               6 rounds, 12.0 MB, 3.00 s",
        "bb             10 rounds, 20.0 MB, 5.00 s",
    ])  # fmt: skip


def test_what_is_sent_of_a_pretrained_model_is_compared_in_the_papers_unit_too(tmp_path):
    tuned = {"task": {"name": "classification", "model": {"name": "pretrained", "method": {"name": "bias"}}}}
    bias = read_run(make_run(tmp_path / "bias", **tuned))
    head = read_run(make_run(tmp_path / "head", cohort=1, **tuned))
    final = {**head.metrics[-1], "bytes_up": 76_900 * 4 * 3, "clients_sampled": 4, "clients_failed": 1}
    write_metrics(head.path, [*head.metrics[:-1], final])
    rows = summary_rows(group_by_seed([bias, read_run(head.path)]))
    columns = {column[0]: column[1:] for column in zip(*rows, strict=True)}
    assert columns["params sent"] == ("50,000", "76,900")  # 1 MB of five clients
    assert columns["paper's MiB a round"] == ("0.95", "0.92")  # 0.05 and 0.08 million, in 32 bits
    assert "params sent" not in summary_rows(group_by_seed([read_run(make_run(tmp_path / "other"))]))[0]


def test_runs_without_accuracy_or_rounds_compare(tmp_path):
    runs = []
    for name, records in (("none", []), ("loss", [{"round": 1, "train_loss": 1.5, "seconds": 1.0}])):
        write_metrics(make_run(tmp_path / name, cohort=len(records)), records)
        runs.append(read_run(tmp_path / name))
    assert comparison(runs).splitlines() == ["run   rounds  seconds", "none       –        –", "loss       1     1.00"]
    Page(write_report([run.path for run in runs], tmp_path / "r.html"))


def test_many_rounds_many_clients_and_many_classes_stay_small(tmp_path):
    folders = []
    for seed in range(4):
        folders.append(make_run(tmp_path / f"r{seed}", rounds=0, rng=seed))
        rng = np.random.default_rng(seed)
        write_metrics(
            folders[-1],
            [
                {"round": n, "train_loss": rng.random(), "test_loss": rng.random(), "test_accuracy": rng.random(),
                 "bytes_up_total": n, "bytes_down_total": n, "seconds": 0.1, "drift": rng.random()}
                for n in range(2500)
            ],
        )  # fmt: skip
        classes = np.array([f"class {index}" for index in range(100)])
        np.savez(folders[-1] / "partition.npz", label_counts=rng.integers(0, 9, (2000, 100)), classes=classes)
        confusion = {"round": 0, "classes": classes.tolist(), "confusion": rng.integers(0, 9, (100, 100)).tolist()}
        (folders[-1] / "evaluation.json").write_text(json.dumps(confusion))
    assert write_report(folders[:1], tmp_path / "one.html").stat().st_size < 1_000_000
    assert write_report(folders, tmp_path / "four.html").stat().st_size < 1_000_000


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=300),
    st.integers(min_value=4, max_value=50),
)
def test_thinning_keeps_the_ends_and_the_extremes(values, limit):
    y = np.array(values)
    rows = thin(y, limit)
    assert (np.diff(rows) > 0).all()
    assert rows[0] == 0
    assert rows[-1] == len(y) - 1
    assert len(rows) <= max(limit, 4)
    known = y[np.isfinite(y)]
    if known.size:
        assert y[rows][np.isfinite(y[rows])].max() == known.max()
        assert y[rows][np.isfinite(y[rows])].min() == known.min()


def test_lines_can_be_told_apart():
    assert len({line_style(index) for index in range(28)}) == 28


def test_methods_that_send_a_hundredth_are_drawn_on_a_logarithmic_axis():
    def sending(each: float) -> Curve:
        rounds = np.arange(6.0)
        return Curve({axis: rounds * (each if axis == "megabytes" else 1) for axis in AXES}, rounds / 10)

    def ticks(others: float, axis: str = "megabytes") -> set[str]:
        return set(re.findall(r">(\d+)</text>", curves_svg([sending(1.0), sending(others)], axis, "test accuracy")))

    assert {"1", "10", "100"} <= ticks(100.0)
    assert "10" not in ticks(40.0)
    assert "10" not in ticks(100.0, "rounds")


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="axis is 'hours'; it must be one of rounds, megabytes, seconds"):
        curves_svg([], "hours", "loss")
