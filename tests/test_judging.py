"""Generated pictures beside test pictures: what is measured, by whatever workers, and the sheets of samples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import assert_same_bits, generation_of_digits
from serial_runs import without_page

from fedray import checkpoint
from fedray.aggregators import Rows, total_with_rows
from fedray.algorithm import Client, ClientResult
from fedray.backends.serial import SerialBackend
from fedray.bits import final_mask
from fedray.data.dataset import make_dataset
from fedray.data.partitions import iid
from fedray.errors import DataError
from fedray.evaluation import SHARD, evaluate
from fedray.experiment import plan
from fedray.export import export, load_masked
from fedray.learner import Learner
from fedray.metrics.quality import frechet_distance, prdc
from fedray.models.feature_maps import small_cnn, torchscript
from fedray.models.image_generators import masked_resnet_generator, resnet_generator
from fedray.models.masked import Masking, mask, probabilities, unmask
from fedray.report import read_run, write_report
from fedray.runs import resume, run
from fedray.seeds import seed_for
from fedray.tasks.generation import Generation, generation
from fedray.tasks.judging import Judging, mask_of

COUNT = 2 * SHARD + 60  # three shards, of which the last is not full


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Generation:
    draw = np.random.default_rng(0)
    columns = {"x": draw.integers(0, 256, (COUNT, 1, 8, 8)).astype(np.uint8), "y": np.arange(COUNT) % 2}
    data = make_dataset("noise", columns, columns, ["a", "b"])
    cache = str(tmp_path_factory.mktemp("features"))
    return generation(
        0,
        data=data,
        partition=lambda d, seed: iid(d, seed, num_clients=4),
        features=lambda shape: small_cnn(shape, data, width=2, epochs=1, cache=cache),
        model=lambda shape: masked_resnet_generator(shape, width=2, latent=3),
        size=8,
        judging=Judging(["fresh", "fixed", "threshold"], neighbour_samples=700),
    )


def test_rows_are_put_behind_each_other_in_the_order_of_the_cohort():
    rule = total_with_rows()
    updates = [{"n": torch.tensor(k), "x": Rows(torch.full((k, 2), float(k)))} for k in (2, 0, 3, 1)]
    folded = rule.zero()
    for slot in (2, 0):
        folded = rule.accumulate(folded, Client(9, 0, slot=slot), ClientResult(updates[slot], 1))
    other = rule.zero()
    for slot in (3, 1):
        other = rule.accumulate(other, Client(9, 0, slot=slot), ClientResult(updates[slot], 1))
    found, weight = rule.report(rule.merge(folded, other))
    assert (int(found["n"]), weight) == (6, 4.0)
    assert found["x"].values[:, 0].tolist() == [2, 2, 3, 3, 3, 1]


def test_figures_and_samples_are_the_same_for_any_number_of_workers(task):
    params = Learner(task, "cpu").params()
    whole, *others = [evaluate(task, params, SerialBackend(task, shares)) for shares in (1, 2, 3)]
    for other in others:
        assert_same_bits(other, whole)
    assert all(0 <= whole[0][name] <= 1 for name in ("precision", "fixed_recall", "threshold_coverage"))


@pytest.mark.parametrize("kind", ["fixed", "threshold"])
def test_a_kind_of_masks_is_measured_as_the_plain_model_under_that_mask(task, kind):
    learner = Learner(task, "cpu")
    params = learner.params()
    metrics, _ = evaluate(task, params, SerialBackend(task))
    masked = Learner(task, "cpu").load(params)
    plain = unmask(masked, mask_of(masked, kind))
    assert not any(name.endswith("scores") for name, _ in plain.named_parameters())
    maps, features = task.feature_maps.on(torch.device("cpu")), []
    for start in range(0, SHARD, 256):
        noise = torch.Generator().manual_seed(seed_for(0, "evaluation", start))
        with torch.no_grad():
            features.append(maps(plain(torch.randn(256, 3, generator=noise)))[1])
    with torch.no_grad():
        real = maps(task.prepare(task.test_examples(0, SHARD), None)["x"])[1].numpy()
    short = replace(task, judging=replace(task.judging, evaluated_masks=[kind]), data=first(task, SHARD))
    found, _ = evaluate(short, params, SerialBackend(short))
    fake = torch.cat(features).numpy()
    assert found[f"{kind}_frechet_distance"] == pytest.approx(frechet_distance(real, fake), rel=1e-3)
    assert found["test_loss"] == found[f"{kind}_frechet_distance"]
    expected = prdc(real, fake, 5)
    assert {name: found[f"{kind}_{name}"] for name in expected} == pytest.approx(expected)
    assert {name.removeprefix(f"{kind}_") for name in metrics if name.startswith(kind)} == {
        "frechet_distance",
        *expected,
    }


def first(task: Generation, count: int):
    return replace(task.data, test={name: column[:count] for name, column in task.data.test.items()})


def test_a_better_generator_is_better_by_every_figure(task):
    """One that makes the test pictures themselves, beside one of random weights."""

    class Copies(torch.nn.Module):
        latent = 3

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return self.x

    judging, learner = Judging(neighbour_samples=200), Learner(task, "cpu")
    batch = learner.prepare(task.test_examples(0, 200))
    maps, perfect = task.feature_maps.on(learner.device), Copies()
    perfect.x = batch["x"]
    with torch.no_grad():
        best, other = [judging.summarize(judging.judge(m, maps, batch, 0))[0] for m in (perfect, learner.model)]
    assert best["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert (best["precision"], best["recall"], best["coverage"]) == (1, 1, 1)
    assert other["frechet_distance"] > best["frechet_distance"]
    assert other["coverage"] < 1


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_another_network_may_compare_than_the_one_that_is_matched(task, tmp_path):
    class Means(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    torch.jit.script(Means()).save(tmp_path / "means.pt")
    other = replace(task, compared_by=torchscript((1, 8, 8), str(tmp_path / "means.pt"), size=16))
    params = Learner(task, "cpu").params()
    metrics, details = evaluate(other, params, SerialBackend(other, 2))
    assert details["extractor"] == "means"
    assert metrics["frechet_distance"] != evaluate(task, params, SerialBackend(task))[0]["frechet_distance"]
    x = task.prepare(task.test_examples(0, 3), None)["x"]
    [found, again] = other.compared_by.on(torch.device("cpu"))(x)
    assert torch.equal(found, again)
    torch.testing.assert_close(
        found, task.test_examples(0, 3)["x"].float().mean((2, 3)).expand(-1, 3), rtol=0.01, atol=1
    )
    with pytest.raises(DataError, match=r"does not exist; give a network that was saved by torch.jit.save"):
        torchscript((1, 8, 8), str(tmp_path / "nothing.pt"))
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(DataError, match=r"is no network that torch.jit has saved"):
        torchscript((1, 8, 8), str(tmp_path / "text.pt"))


def test_neighbours_are_left_out_on_demand_and_where_there_are_none(task):
    params = Learner(task, "cpu").params()
    for changed in (
        replace(task, judging=Judging(neighbour_samples=0)),
        replace(task, data=first(task, 5), judging=Judging()),
    ):
        metrics, _ = evaluate(changed, params, SerialBackend(changed))
        assert metrics.keys() == {"frechet_distance", "test_loss"}


def test_mistaken_options_say_so():
    with pytest.raises(ValueError, match=r"evaluated_masks is \[\]; name one or several, each once"):
        Judging([])
    with pytest.raises(ValueError, match="neighbour_samples is 5; it must be 0, or at least 6"):
        Judging(neighbour_samples=5)
    with pytest.raises(ValueError, match=r"evaluated_masks is \['fixed'\], but the generator has no masks"):
        Judging(["fixed"]).check(resnet_generator((1, 8, 8), 2, 3))


@pytest.mark.parametrize("mode", ["top_k", "threshold"])
def test_the_final_mask_of_a_model_without_chance_is_the_one_it_uses(mode):
    torch.manual_seed(1)
    model = mask(torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)), Masking(mode=mode, keep=0.3))
    assert torch.equal(final_mask(probabilities(model)), (model[0].weight != 0).flatten())


# --- sheets


def values(tmp_path):
    return {
        "rounds": 4,
        "cohort": 3,
        "task": {
            **generation_of_digits(tmp_path / "c", {"name": "masked_resnet_generator", "width": 2, "latent": 4}),
            "evaluated_masks": ["fresh", "fixed"],
        },
        "algorithm": {"name": "prism", "local_optimizer": "adam", "local_steps": 1, "batch_size": 8},
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 5,
        "backend": "serial",
    }


def sheets(folder):
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


def test_every_evaluation_leaves_a_sheet_and_the_fixed_mask_is_the_exported_one(tmp_path):
    with without_page():
        done = run(values(tmp_path), out=tmp_path / "a")
    whole = sheets(tmp_path / "a")
    assert sorted(whole) == ["000000.png", "000002.png", "000004.png"]
    assert max(map(len, whole.values())) < 4000
    assert sorted(done.record.samples) == [0, 2, 4]
    plain = load_masked(export(tmp_path / "a", tmp_path / "mask"))
    learner = Learner(plan(values(tmp_path)).experiment.task, "cpu")
    final = learner.load(checkpoint.read_params(tmp_path / "a" / "model.safetensors"))
    assert_same_bits(dict(plain.state_dict()), dict(unmask(final, mask_of(final, "fixed")).state_dict()))
    assert done.final["fixed_frechet_distance"] > 0

    # what will be run again is forgotten, and comes back the same; what a search takes out and puts back, too
    checkpoint.take_out(tmp_path / "a", 2, tmp_path / "taken")
    checkpoint.put_back(tmp_path / "taken", tmp_path / "a")
    assert sheets(tmp_path / "a") == whole
    (tmp_path / "a" / "samples" / "000004.png").write_bytes(b"of another future")
    (tmp_path / "a" / "samples" / "mine.png").write_bytes(b"of a user")
    checkpoint.forget_after(tmp_path / "a", 2)
    assert sorted(sheets(tmp_path / "a")) == ["000000.png", "000002.png", "mine.png"]
    with without_page():
        assert resume(tmp_path / "a").finished
    assert sheets(tmp_path / "a") == whole | {"mine.png": b"of a user"}


def test_a_report_says_which_round_had_the_least_distance(tmp_path):
    (tmp_path / "config.yaml").write_text("rounds: 4\n")
    records = [{"round": 0}, {"round": 2, "frechet_distance": 3.25}, {"round": 4, "frechet_distance": 7.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "<dt>Fréchet distance</dt><dd>7.5000</dd><p>best 3.2500, round 2</p>" in page


def test_a_report_shows_the_first_sheet_the_newest_and_some_between(tmp_path):
    (tmp_path / "config.yaml").write_text("rounds: 30\n")
    for number in range(31):
        checkpoint.write_sheet(tmp_path, number, bytes([number]))
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    shown = [number for number in range(31) if f"<figcaption>round {number}<" in page]
    assert (len(shown), shown[0], shown[-1]) == (12, 0, 30)
    assert read_run(tmp_path).samples == {number: bytes([number]) for number in range(31)}


def test_a_report_of_several_runs_shows_the_newest_sheet_of_each(tmp_path):
    for name, number in (("a", 4), ("b", 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"rounds: {number}\n")
        for earlier in (0, number):
            checkpoint.write_sheet(tmp_path / name, earlier, b"a picture")
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html").read_text()
    assert [f"<figcaption>{caption}<" in page for caption in ("a, round 4", "b, round 6", "a, round 0")] == [
        True,
        True,
        False,
    ]
