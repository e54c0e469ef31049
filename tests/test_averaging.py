"""LoRA's averages: every exact one is the average of the merged weights, and every byte of it is counted."""

import copy as copies
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from problems import LOCAL, SIZES, Problem, adapted, assert_same_bits, blobs, make, regression, train
from safetensors.torch import load_file
from serial_runs import measured, without_page
from torch import nn

from fedray import cli
from fedray.algorithm import Client
from fedray.backends.serial import SerialBackend
from fedray.errors import ConfigError
from fedray.experiment import plan
from fedray.export import export
from fedray.learner import Learner
from fedray.ledger import Ledger, MeteredBackend
from fedray.models import Classifier, hugging_face
from fedray.peft.averaging import AVERAGINGS, Averaging, Factors, Merged, ideal, total
from fedray.peft.factors import cut, filled, is_base, role
from fedray.peft.library import lora
from fedray.rounds import clients
from fedray.runs import run
from fedray.samplers import Population, Selection

pytest.importorskip("peft")

EXACT = ("ffa", "rolora", "fedex", "flora")
S = 1.5  # the scale
every = pytest.mark.parametrize("name", AVERAGINGS)


def drawn(count: int, seed: int = 0, rank: int = 3, shape: tuple[int, int] = (7, 6)) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return [Factors(normal(rank, shape[1]), normal(shape[0], rank)) for _ in range(count)]


def weights(count: int) -> list[float]:
    return [(k + 1) / (count * (count + 1) / 2) for k in range(count)]


def dense(factors: Factors) -> torch.Tensor:
    return factors.B @ factors.A


def wished(factors: Sequence[Factors], p: Sequence[float]) -> torch.Tensor:
    """What an average should come to, written out."""
    return sum((S * weight * f.B @ f.A for weight, f in zip(p, factors, strict=True)), torch.zeros(()))


def merge(name: str, factors: Sequence[Factors]) -> tuple[Merged, torch.Tensor]:
    """What becomes of a layer, and of W − W0."""
    merged = AVERAGINGS[name]().merge(factors, weights(len(factors)), S, torch.Generator().manual_seed(1))
    change = S * dense(merged.factors)
    return merged, change if merged.residual is None else change + dense(merged.residual)


# Rules, one layer at a time


def as_trained(name: str, factors: list[Factors], round: int = 1) -> list[Factors]:
    """With the factor that clients do not train the same for all."""
    trained = AVERAGINGS[name]().trained(round)
    first = factors[0]
    return [Factors(f.A if "A" in trained else first.A, f.B if "B" in trained else first.B) for f in factors]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("name", "round"), [*((name, 1) for name in EXACT), ("rolora", 2)])
def test_an_exact_average_is_the_average_of_the_products(name: str, round: int, count: int):
    factors = as_trained(name, drawn(count), round)
    torch.testing.assert_close(merge(name, factors)[1], wished(factors, weights(count)))


def test_the_mean_of_the_factors_misses_their_covariance():
    factors, p = drawn(4), weights(4)
    mean, change = merge("fedit", factors)
    apart = sum(
        (S * weight * (f.B - mean.factors.B) @ (f.A - mean.factors.A) for weight, f in zip(p, factors, strict=True)),
        torch.zeros(()),
    )
    torch.testing.assert_close(wished(factors, p) - change, apart)
    assert float(apart.norm()) > 0.1 * float(change.norm())


@every
def test_one_client_is_the_identity(name: str):
    [factors] = drawn(1)
    torch.testing.assert_close(merge(name, [factors])[1], S * dense(factors))


@every
def test_the_order_of_the_clients_does_not_matter(name: str):
    factors, p = drawn(4), weights(4)
    rule, found = AVERAGINGS[name](), []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        merged = rule.merge([factors[k] for k in order], [p[k] for k in order], S, torch.Generator().manual_seed(1))
        change = S * dense(merged.factors)
        found.append(change if merged.residual is None else change + dense(merged.residual))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rank", [1, 3])
def test_flexlora_misses_the_tail_of_the_singular_values_and_never_more_than_fedit(rank: int):
    factors = drawn(4, rank=rank)
    target = wished(factors, weights(4))
    missed = float((target - merge("flexlora", factors)[1]).norm())
    tail = torch.linalg.svdvals(target)[rank:]
    assert missed == pytest.approx(float(tail.square().sum().sqrt()))
    assert 0 < missed < float((target - merge("fedit", factors)[1]).norm())


def test_flexlora_is_exact_where_the_rank_suffices():
    factors = [Factors(f.A, f.B[:, :1] @ torch.ones(1, 8, dtype=torch.float64)) for f in drawn(3, rank=8)]
    torch.testing.assert_close(merge("flexlora", factors)[1], wished(factors, weights(3)))  # rank 3 of 8, in 7 × 6
    assert merge("flexlora", factors)[0].factors.A.shape == (8, 6)


def test_flexlora_gives_each_rank_its_own_best():
    factors = drawn(4)
    merged, _ = merge("flexlora", factors)
    two = Factors(merged.factors.A[:2], merged.factors.B[:, :2])
    target = wished(factors, weights(4))
    tail = torch.linalg.svdvals(target)[2:]
    assert float((target - S * dense(two)).norm()) == pytest.approx(float(tail.square().sum().sqrt()))


def test_fedex_sends_one_product_less_than_clients():
    merged, _ = merge("fedex", drawn(5))
    assert merged.residual is not None
    assert merged.residual.A.shape == (4 * 3, 6)
    assert AVERAGINGS["fedex"]().merge(drawn(1), [1.0], S, torch.Generator()).residual is None


def test_flora_draws_new_factors_as_peft_does():
    merged, _ = merge("flora", drawn(3, rank=50, shape=(7, 400)))
    bound = nn.init.calculate_gain("leaky_relu", 5**0.5) * (3 / 400) ** 0.5  # kaiming_uniform_(a=√5)
    assert not merged.factors.B.any()
    assert float(merged.factors.A.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(merged.factors.A.mean()) == pytest.approx(0, abs=0.02 * bound)


def test_norms_and_sums_need_no_matrix_of_the_layers_size():
    one, other = drawn(2)
    assert one.norm == pytest.approx(float(dense(one).norm()))
    torch.testing.assert_close(dense(total((2.0, one), (-0.5, other))), 2 * dense(one) - 0.5 * dense(other))
    torch.testing.assert_close(dense(ideal([one, other], [0.25, 0.75], S)), wished([one, other], [0.25, 0.75]))
    assert total((1.0, one), (-1.0, one)).norm == pytest.approx(0, abs=1e-12)
    wide = drawn(1, rank=20)[0]  # of more components than the matrix has rows
    assert wide.norm == pytest.approx(float(dense(wide).norm()))


def test_secure_rules_need_nothing_but_sums():
    assert {name for name in AVERAGINGS if AVERAGINGS[name]().secure} == {"fedit", "ffa", "rolora"}
    factors, p = drawn(4), weights(4)
    alike = [Factors(*(sum(w * x for w, x in zip(p, xs, strict=True)) for xs in pair)) for pair in
             [([f.A for f in factors], [f.B for f in factors])]] * 4  # fmt: skip
    for name in ("fedit", "ffa", "rolora"):  # so that clients with the same sums come to the same
        rule = AVERAGINGS[name]()
        torch.testing.assert_close(
            *(dense(rule.merge(each, p, S, torch.Generator()).factors) for each in (factors, alike))
        )


# Whole rounds


def effective(learner: Learner, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + s·B·A of every layer, as peft computes it, and whatever else is trained."""
    model = learner.load(params)
    found = {
        path: (module.base_layer.weight + module.get_delta_weight("default")).detach().double().clone()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert found
    return found | {name: p.double() for name, p in params.items() if role(name) is None and not is_base(name)}


def cohort_of(round: int, *ids: int) -> list[Client]:
    return clients(Selection(ids), Population(adapted().sizes), 0, round)


def lora_rounds(task: Problem, ledger: Ledger, cohorts: Sequence[Sequence[int]], **options: Any) -> Any:
    """What the rounds come to, one after the other."""
    algorithm = make("fedlora", local=LOCAL, **options)
    state = algorithm.init(Learner(task, "cpu").params())
    backend = MeteredBackend(SerialBackend(task), ledger)
    for number, ids in enumerate(cohorts, 1):
        ledger.open_round()
        before, (state, metrics) = state, algorithm.apply(state, cohort_of(number, *ids), backend)
        yield before, state, metrics


@pytest.mark.parametrize("ranks", [None, [1, 3, 2]], ids=["one rank", "three ranks"])
@every
def test_the_servers_model_is_the_average_of_the_clients_merged_models(name: str, ranks: list[int] | None):
    task, rule = adapted(), AVERAGINGS[name]()
    local = replace(LOCAL, local_lr=0.3)
    algorithm = make("fedlora", local=local, averaging=rule, ranks=ranks)
    learner, backend = Learner(task, "cpu"), SerialBackend(task, 3)
    state = algorithm.init(learner.params())
    for number, ids in enumerate(((1, 4, 6), (0, 3, 4, 7), (2, 5, 8), (1, 2, 3)), 1):
        x, cohort = state.params, cohort_of(number, *ids)
        names = {n for n in learner.params() if role(n) in (None, *rule.trained(number))}
        merged, p = [], [SIZES[k] / sum(SIZES[k] for k in ids) for k in ids]
        for client in cohort:
            start = x if ranks is None else filled(cut(x, ranks[client.id % 3]), x)
            y = learner.train(start, client, local, only=names).params
            changed = {n: p for n, p in x.items() if is_base(n)}
            merged.append(effective(learner, {**y, **changed}))
        expected = {key: sum(w * each[key] for w, each in zip(p, merged, strict=True)) for key in merged[0]}
        state, metrics = algorithm.apply(state, cohort, backend)
        found = effective(learner, state.params)
        missed = sum(float((found[k] - expected[k]).square().sum()) for k in found if not k.startswith("head")) ** 0.5
        for key in ("head.weight", "head.bias"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
        assert metrics["lora_error"] == pytest.approx(missed, rel=1e-3, abs=2e-6)
        if name in EXACT:
            assert missed < 2e-6
            assert metrics["lora_error"] < 1e-9
        elif number > 1:  # before, B was zero everywhere, and one step is exact
            assert missed > 1e-5
            assert 0 < metrics["lora_relative_error"] < 1


def test_flexlora_errs_less_than_fedit():
    errors = {}
    for name in ("fedit", "flexlora"):
        [*_, (_, _, metrics)] = lora_rounds(adapted(), Ledger(), [(4, 6, 7)], averaging=AVERAGINGS[name]())
        errors[name] = metrics["lora_relative_error"]
    assert errors["flexlora"] < errors["fedit"]


@every
def test_only_the_factors_that_a_rule_trains_change(name: str):
    task, rule = adapted(), AVERAGINGS[name]()
    for number, (before, after, _) in enumerate(
        lora_rounds(task, Ledger(), [(1, 4), (3, 6), (2, 7)], averaging=rule), 1
    ):
        for role_ in "AB":
            moved = {
                n for n in before.params if role(n) == role_ and not torch.equal(before.params[n], after.params[n])
            }
            assert bool(moved) == (role_ in rule.trained(number) and not (name == "flora" and role_ == "B")), role_
        assert any(map(is_base, after.params)) == (name in ("fedex", "flora"))


def test_without_a_rule_of_its_own_it_is_fedavg():
    task = adapted()
    mine = train(task, make("fedlora", local=LOCAL), SerialBackend(task))
    fedavg = train(task, make("fedavg", local=LOCAL), SerialBackend(task))
    torch.testing.assert_close(mine[-1].state.params, fedavg[-1].state.params, rtol=1e-5, atol=1e-6)


@every
def test_workers_of_clients_of_many_ranks_change_nothing(name: str):
    task, algorithm = adapted(), make("fedlora", local=LOCAL, averaging=AVERAGINGS[name](), ranks=[1, 3, 2])
    one, *others = ([(r.state, r.metrics) for r in train(task, algorithm, SerialBackend(task, n))] for n in (1, 2, 7))
    for other in others:
        assert_same_bits(one, other)


# Bytes


def wide() -> Problem:
    """Two adapted layers, 4 → 40 and 40 → 30, with rank 1."""

    def build() -> nn.Module:
        trunk = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh())
        return Classifier(lora(trunk, rank=1, targets=["0", "2"]), 30, 3)

    return replace(adapted(), build=build)


A, B = 4 * (4 + 40), 4 * (40 + 30)
HEAD, BASE = 4 * (30 * 3 + 3), 4 * (4 * 40 + 40 * 30)
COHORTS = ((0, 1, 2), (0, 3), (1, 3, 4, 0))
# bytes down of each round: everybody, then who was there a round ago, who was there before that, and newcomers
DOWN = {
    "fedit": (3 * (A + B), 2 * (A + B), 4 * (A + B)),
    "ffa": (3 * B, 2 * B, 4 * B),
    "rolora": (3 * (A + B), B + (A + B), (A + B) + A + (A + B) + A),
    # with changes of 2, 1 products (FedEx: K − 1) and 3, 2 (FLoRA: K) after rounds 1 and 2; a client has those that
    # were made before it was there
    "fedex": (3 * (A + B), 2 * (A + B) + 2 * 2 * (A + B), 4 * (A + B) + (3 + 1 + 3 + 1) * (A + B)),
    "flora": (0, 2 * 3 * (A + B), (5 + 2 + 5 + 2) * (A + B)),
    "flexlora": (3 * (A + B), 2 * (A + B), 4 * (A + B)),
}


@every
def test_bytes_down_are_what_each_client_lacks(name: str):
    ledger, found = Ledger(), []
    for _ in lora_rounds(wide(), ledger, COHORTS, averaging=AVERAGINGS[name]()):
        found.append((ledger.up, ledger.down))
    trained = [AVERAGINGS[name]().trained(t) for t in (1, 2, 3)]
    up = [sum({"A": A, "B": B}[each] for each in factors) + HEAD for factors in trained]
    assert [u for u, _ in found] == [len(ids) * size for ids, size in zip(COHORTS, up, strict=True)]
    assert [d for _, d in found] == [size + len(ids) * HEAD for ids, size in zip(COHORTS, DOWN[name], strict=True)]


def test_who_was_away_for_long_gets_the_changed_weights_instead_of_every_change():
    ledger = Ledger()
    cohorts = [(0, 1, 2, 3, 4, 5, 6)] * 2 + [(7,)]
    for _ in lora_rounds(wide(), ledger, cohorts, averaging=AVERAGINGS["flora"]()):
        pass
    assert BASE < 2 * 7 * (A + B)
    assert ledger.down == BASE + HEAD


@every
def test_a_client_of_a_lower_rank_sends_and_receives_less(name: str):
    task, ledger = adapted(), Ledger()
    per_rank = {"A": 4 * (4 + 6), "B": 4 * (6 + 5)}
    rule, head = AVERAGINGS[name](), 4 * (5 * 3 + 3)
    for _ in lora_rounds(task, ledger, [(0, 1)], averaging=rule, ranks=[1, 3]):
        pass
    assert ledger.up == sum((1 + 3) * per_rank[each] for each in rule.trained(1)) + 2 * head
    assert ledger.down == sum((1 + 3) * per_rank[each] for each in rule.sent) + 2 * head


def test_components_that_a_client_does_not_have_are_not_counted_as_changes():
    [(_, state, _)] = lora_rounds(adapted(), Ledger(), [(0, 1)], averaging=AVERAGINGS["flora"](), ranks=[1, 3])
    assert state.residuals.tolist() == [0, (1 + 3) * 4 * (4 + 6 + 6 + 5)]


# Pre-trained models


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tiny_models.saved(tiny_models.vit(), tmp_path_factory.mktemp("vit"))
    moments = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    (made / "preprocessor_config.json").write_text(moments)
    return made


def configuration(folder: Path, averaging: str, **changes: Any) -> dict[str, Any]:
    values = tiny_models.configuration(folder, method={"name": "lora", "rank": 2})
    algorithm = {"name": "fedlora", "local_lr": 0.5, "batch_size": 8, "averaging": averaging}
    return {**values, "algorithm": algorithm, "rounds": 3, **changes}


@pytest.mark.parametrize("averaging", ["fedex", "flora"])
def test_a_changed_base_is_nobody_elses(folder, tmp_path, averaging):
    values = configuration(folder, averaging)
    task = plan(values).experiment.task
    other = Learner(task, "cpu")
    before = copies.deepcopy(dict(other.model.named_parameters()))
    with without_page():
        done = run(values, out=tmp_path / "run").folder
    params = load_file(done / "model.safetensors")
    assert {name for name in params if is_base(name)} == {name for name in before if is_base(name)}
    assert all(not torch.equal(params[name], before[name]) for name in params if is_base(name))
    for model in (other.model, task.model()):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    other.load(params)
    frozen = next(name for name in params if is_base(name))
    assert torch.equal(other.model.get_parameter(frozen), params[frozen])
    other.load({name: p for name, p in params.items() if not is_base(name)})  # whose base is the pre-trained one
    assert torch.equal(other.model.get_parameter(frozen), before[frozen])


@pytest.mark.parametrize("averaging", ["fedit", "fedex", "flora"])
def test_peft_loads_the_model_with_the_weights_that_a_run_merged(folder, tmp_path, averaging):
    import peft
    from transformers import AutoModel

    with without_page():
        done = run(configuration(folder, averaging), out=tmp_path / "run").folder
    out = export(done, tmp_path / "adapter")
    base = peft.PeftConfig.from_pretrained(out).base_model_name_or_path
    assert Path(base) == (folder if averaging == "fedit" else out / "base")
    loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), out).eval()
    task = plan(configuration(folder, averaging)).experiment.task
    model = Learner(task, "cpu").load(load_file(done / "model.safetensors")).eval()
    x, call = task.prepare(task.test_examples(0, 8), None)["x"], model.features._call
    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (call.scale, call.shift))
    expected = loaded(pixel_values=x.expand(-1, 3, -1, -1) * scale + shift).last_hidden_state[:, 0]
    torch.testing.assert_close(model.features(x), expected)
    assert hugging_face.own_moments(base, "vit") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    again = configuration(Path(base), averaging)  # and a run goes on from it
    again["task"]["model"]["adapter"] = str(out)
    start = Learner(plan(again).experiment.task, "cpu").model.eval()
    torch.testing.assert_close(start(x), model(x))


def test_ray_computes_the_same(folder, tmp_path, ray_local):
    found = []
    for backend in ({"name": "serial"}, {"name": "ray", "num_workers": 2}):
        with without_page():
            done = run(configuration(folder, "flora", backend=backend), out=tmp_path / backend["name"]).folder
        found.append(((done / "model.safetensors").read_bytes(), measured(done)))
    assert found[0] == found[1]


# Mistakes


def test_a_model_without_factors_and_impossible_ranks_are_refused(folder, tmp_path, capsys, monkeypatch):
    for task in (regression(), blobs()):
        with pytest.raises(ConfigError, match=r"this model has none; give task\.model\.method=lora"):
            train(task, make("fedlora", local=LOCAL), SerialBackend(task))
    with pytest.raises(ConfigError, match=r"algorithm.ranks is \[2, 4\]; the model's rank is 3, see task.model.method"):
        train(adapted(), make("fedlora", local=LOCAL, ranks=[2, 4]), SerialBackend(adapted()))
    for ranks in ([], [2, 0]):
        with pytest.raises(ValueError, match=r"ranks is \[.*; it must be a list of ranks of at least 1, or null"):
            make("fedlora", local=LOCAL, ranks=ranks)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "quickstart", "algorithm.name=fedlora"]) == 2  # before anything starts
    assert "give task.model.method=lora" in capsys.readouterr().err


def test_a_rule_of_ones_own_is_a_function():
    def first(factors: Sequence[Factors], *_: Any) -> Merged:
        return Merged(factors[0])

    own = Averaging(first, secure=False)
    [(_, state, metrics)] = lora_rounds(adapted(), Ledger(), [(1, 4)], averaging=own)
    alone = next(lora_rounds(adapted(), Ledger(), [(1,)]))[1]
    for name in itertools.filterfalse(is_base, state.params):
        if role(name):
            torch.testing.assert_close(state.params[name], alone.params[name])
    assert metrics["lora_error"] > 0
