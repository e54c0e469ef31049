"""Sums whose bits do not depend on how the terms are grouped, against exact fractions."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_c
from problems import assert_same_bits, copy

from fedray import exact, kernels

QUANTUM = Fraction(1, 2**36)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.uint8, torch.bool)

numbers = st.floats(-100, 100, width=32) | st.floats(-(2.0**-30), 2.0**-30, width=32) | st.just(0.0)
whole_weights = st.integers(0, 500)
weights = whole_weights | st.floats(0.01, 50)
quick = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def terms(draw: st.DrawFn, weights: Any = weights) -> list[tuple[dict[str, Any], float]]:
    """A few trees of the same shape, each with its weight."""
    size = draw(st.integers(0, 5))

    def tree() -> dict[str, Any]:
        vector = torch.tensor(draw(st.lists(numbers, min_size=size, max_size=size)), dtype=torch.float32)
        return {"v": vector, "deep": {"scalar": torch.tensor(draw(numbers)), "number": draw(numbers)}}

    return [(tree(), draw(weights)) for _ in range(draw(st.integers(1, 8)))]


def total_of(terms: list[tuple[Any, float]]) -> Any:
    total = None
    for tree, weight in terms:
        total = exact.add_term(total, tree, weight)
    return total


def fractions(terms: list[tuple[Any, float]], *path: str) -> list[Fraction]:
    """The sum of one leaf of all terms, entry by entry, exactly."""
    sums: list[Fraction] = []
    for tree, weight in terms:
        for name in path:
            tree = tree[name]
        entries = torch.as_tensor(tree, dtype=torch.float64).reshape(-1).tolist()
        sums = sums or [Fraction(0)] * len(entries)
        sums = [s + Fraction(x) * Fraction(weight) for s, x in zip(sums, entries, strict=True)]
    return sums


def error_bound(terms: list[tuple[Any, float]]) -> Fraction:
    """Half a quantum a term (times its weight, if that is whole), and what float64 loses in weight × value."""
    return sum(
        (
            Fraction(w) * QUANTUM / 2 if float(w).is_integer() else QUANTUM / 2 + Fraction(w) * 100 / 2**53
            for _, w in terms
        ),
        Fraction(0),
    )


@quick
@given(terms(), st.randoms(use_true_random=False), st.integers(1, 5))
def test_any_order_and_any_grouping_give_the_same_bits(terms: Any, random: Any, num_groups: int):
    groups: list[list[Any]] = [[] for _ in range(num_groups)]
    for term in random.sample(terms, len(terms)):
        random.choice(groups).append(term)
    partials = [total_of(group) for group in groups]
    random.shuffle(partials)
    while len(partials) > 1:  # a tree of merges
        left, right = partials.pop(random.randrange(len(partials))), partials.pop()
        partials.append(exact.merge(left, right))
    whole = total_of(terms)
    divisor = Fraction(random.randint(1, 1000), 7)
    assert_same_bits(exact.value(partials[0], divisor), exact.value(whole, divisor))
    assert torch.equal(partials[0].floats.fixed, whole.floats.fixed)


@quick
@given(terms())
def test_the_error_is_half_a_quantum_a_term(terms: Any):
    total = total_of(terms)
    expected = fractions(terms, "deep", "scalar") + fractions(terms, "v")  # in the order of their names
    for fixed, sum_of_fractions in zip(total.floats.fixed.tolist(), expected, strict=True):
        assert abs(fixed * QUANTUM - sum_of_fractions) <= error_bound(terms)
    assert exact.value(total)["deep"]["number"] == float(fractions(terms, "deep", "number")[0])


@quick
@given(terms(whole_weights))
def test_a_mean_with_whole_weights_is_exact_to_half_a_quantum(terms: Any):
    weight = sum(Fraction(w) for _, w in terms)
    if weight == 0:
        return
    mean = exact.value(total_of(terms), weight)
    for value, expected in zip(mean["v"].tolist(), fractions(terms, "v"), strict=True):
        rounded_to_float32 = abs(expected / weight) / 2**24
        assert abs(Fraction(value) - expected / weight) <= QUANTUM / 2 + rounded_to_float32 + Fraction(1, 2**60)
    assert mean["deep"]["number"] == float(fractions(terms, "deep", "number")[0] / weight)


@quick
@given(st.lists(st.floats(-3e4, 3e4, width=32), min_size=1, max_size=20), st.integers(1, 3000))
def test_the_mean_of_one_term_is_the_term(values: list[float], weight: int):
    term = {"x": torch.tensor(values, dtype=torch.float32)}
    mean = exact.value(exact.add_term(None, term, weight), Fraction(weight))["x"]
    assert ((mean.double() - term["x"].double()).abs() <= 2.0**-37).all()
    representable = term["x"].abs() >= 2.0**-13  # float32 then has no finer steps than 2^-36
    assert torch.equal(mean[representable], term["x"][representable])


@needs_c
@quick
@given(terms(), st.integers(0, 2**32 - 1))
def test_the_kernel_adds_the_same_bits_as_passes_do(terms: Any, seed: int):
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((3, 5000)) * 10.0 ** draw.integers(-12, 5, (3, 5000))
    x = torch.from_numpy(rows).float().clamp(-3e4, 3e4)
    stack = {"x": x, "few": torch.from_numpy(rows[:, :7]).float(), "with gaps": x.t().contiguous().t()}
    times = draw.integers(0, 300, 3).tolist()

    def sums() -> list[torch.Tensor]:
        return [total_of(terms).floats.total, exact.add_stack(None, stack, times).floats.total]

    assert exact.add_rows() is not None
    found = [sums()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_CHUNK", 3000)  # rows are cut
        found.append(sums())
        patch.setattr(exact, "add_rows", lambda: None)
        found.append(sums())
    for each in zip(*found, strict=True):
        assert all(torch.equal(one, each[0]) for one in each)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "/etc/passwd"])
def test_without_a_compiler_there_is_no_kernel_and_no_error(compiler: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    assert kernels.add_rows.__wrapped__() is None
    assert not list(tmp_path.rglob("*.so"))


@needs_c
def test_a_kernel_is_compiled_once_a_user_and_needs_a_place_to_be(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernels.add_rows.__wrapped__() is not None
    [made] = tmp_path.rglob("*.so")
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: pytest.fail("it was compiled again"))
    assert kernels.add_rows.__wrapped__() is not None
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(made))  # a file
    assert kernels.add_rows.__wrapped__() is None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_type_keeps_its_type_and_rounds_once(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    terms = [({"x": torch.randn(50, generator=draw).to(dtype)}, weight) for weight in (1, 3, 10)]
    mean = exact.value(total_of(terms), Fraction(14))["x"]
    expected = torch.tensor([float(f / 14) for f in fractions(terms, "x")], dtype=torch.float64).to(dtype)
    assert mean.dtype == dtype
    torch.testing.assert_close(mean, expected, rtol=0, atol=2.0**-37 if dtype == torch.float64 else 0)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_whole_numbers_are_exact(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    terms = [
        ({"x": torch.randint(2 if dtype == torch.bool else 200, (50,), generator=draw).to(dtype)}, w) for w in (1, 3, 7)
    ]
    total = total_of(terms)
    assert total.wholes.total.tolist() == [int(f) for f in fractions(terms, "x")]
    assert exact.value(total)["x"].dtype == torch.float32
    assert exact.value(total)["x"].tolist() == [float(f) for f in fractions(terms, "x")]


def test_large_whole_numbers_are_exact():
    total = total_of([(torch.tensor([2**61 - 3, -(2**61) + 5]), 1), (torch.tensor([1, 1]), 2)])
    assert total.wholes.total.tolist() == [2**61 - 1, -(2**61) + 7]


def test_whole_numbers_need_whole_weights():
    with pytest.raises(
        ValueError, match=r"a tensor of torch.bool was sent with weight 0.5; whole numbers need whole weights"
    ):
        exact.add_term(None, torch.tensor([True]), 0.5)


def test_many_terms_in_chunks_and_without_memory_layout():
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = total_of([(x.t(), 3), (x.t(), 0.5)]).floats.fixed
    expected = (x.t() * 2**36).round().long() * 3 + (x.t() * 0.5 * 2**36).round().long()
    assert torch.equal(total, expected.flatten())


def test_many_tensors_of_all_sizes_and_types_in_any_order_of_names():
    draw = torch.Generator().manual_seed(0)
    sizes = {"small": (3,), "wide": (200, 400), "none": (0,), "scalar": (), "tail": (50_000,)}
    term = {name: torch.randn(size, generator=draw).to(FLOATS[k % 4]) for k, (name, size) in enumerate(sizes.items())}
    term |= {f"count {dtype}": torch.tensor([1, 0]).to(dtype) for dtype in WHOLE}
    backwards = {name: term[name] for name in reversed(term)}
    sum_of_both = exact.merge(exact.add_term(None, term, 2), exact.add_term(None, backwards, 3))
    mean = exact.value(sum_of_both, Fraction(5))
    assert list(mean) == list(term)
    for name, tensor in term.items():
        expected = exact.value(exact.add_term(None, tensor, 1))
        assert mean[name].dtype == expected.dtype
        torch.testing.assert_close(mean[name], expected, rtol=0, atol=2.0**-37 + 2.0**-23)
        assert mean[name].shape == tensor.shape


def test_each_tensor_of_a_mean_has_memory_of_its_own():
    mean = exact.value(exact.add_term(None, {"a": torch.ones(3, dtype=torch.float64), "b": torch.zeros(3)}, 1))
    mean["a"].fill_(7)
    assert mean["b"].tolist() == [0, 0, 0]
    assert mean["a"].untyped_storage().nbytes() == 24


def test_a_sum_of_many_terms_is_fsum():
    draw = torch.Generator().manual_seed(0)
    terms = [(torch.randn(1, generator=draw, dtype=torch.float64), 1) for _ in range(1000)]
    expected = math.fsum(x.item() for x, _ in terms)
    assert exact.value(total_of(terms)).item() == pytest.approx(expected, abs=1000 * 2.0**-37)
    numbers = [(x.item(), 1) for x, _ in terms]
    assert exact.value(total_of(numbers)) == expected


def test_empty_tensors_scalars_and_trees():
    term = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5), "none": {}}
    mean = exact.value(total_of([(term, 2), (term, 2)]), Fraction(4))
    assert mean["empty"].shape == (0, 3)
    assert mean["scalar"].item() == 1.5
    assert mean["none"] == {}
    assert exact.merge(None, None) is None


def test_a_term_is_read_only_and_its_graph_is_not_kept():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    total = exact.add_term(None, x * 1, 0.3)
    assert not total.floats.total.requires_grad
    before = x.detach().clone()
    exact.add_term(total, x, 5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_makes_the_sum_nan_for_good(number: float):
    total = total_of([(1.0, 1), (number, 1), (1.0, 1)])
    assert math.isnan(exact.value(total))
    assert math.isnan(exact.value(exact.merge(total_of([(1.0, 1)]), total)))


# Refusals: whatever is refused leaves the sum as it was


def refuse(total: Any, term: Any, weight: float, error: type[Exception], match: str) -> None:
    before = copy({"sum": total})
    with pytest.raises(error, match=match):
        exact.add_term(total, term, weight)
    assert_same_bits(copy({"sum": total}), before)


BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "too large": 2.0**15, "too small": -(2.0**15)}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("weight", [0, 1, 0.5])
def test_what_is_not_finite_or_too_large_is_refused_before_anything_is_written(bad: float, weight: float):
    good = {"a": torch.ones(3), "n": 1.0, "z": torch.ones(3)}
    total = exact.add_term(None, good, 2)
    refuse(total, {**good, "z": torch.tensor([1.0, bad, 1.0])}, weight, OverflowError, "training diverged")
    assert_same_bits(exact.value(exact.add_term(total, good, 1)), exact.value(total_of([(good, 3)])))


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight: float):
    refuse(exact.add_term(None, {"x": torch.ones(2)}, 1), {"x": torch.ones(2)}, weight, OverflowError, "a weight is")


def test_the_weighted_sum_has_a_range_and_leaving_it_is_no_silent_wrap():
    x = torch.tensor([2.0**14])
    total = exact.add_term(None, x, 2**12)
    refuse(total, x, 2**12, OverflowError, r"terms below 32768, sums below 1\.342.*e\+08")
    with pytest.raises(
        OverflowError, match=r"the sum of what the clients sent reaches 1\.342.*e\+08; it must stay below"
    ):
        exact.merge(total, exact.add_term(None, x, 2**12))
    refuse(total, x, 2.0**13 + 0.5, OverflowError, "too large for the exact sum")
    refuse(None, x, 2.5, OverflowError, "too large for the exact sum")  # the weighted term is what is rounded


def test_the_range_allows_for_the_rounding():
    just_below = torch.nextafter(torch.tensor([2.0**15], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    refuse(None, just_below, 2**12, OverflowError, "too large")  # it would be rounded up, and wrap
    refuse(None, torch.tensor([2.0**-36]), 2**63, OverflowError, "too large")
    refuse(None, torch.zeros(1), 1e300, OverflowError, "too large")
    assert exact.value(exact.add_term(None, just_below, 2**12 - 1)).item() == pytest.approx(2.0**27 - 2.0**15)


def test_the_sum_of_whole_numbers_has_a_range():
    total = exact.add_term(None, torch.tensor([2**61]), 1)
    refuse(total, torch.tensor([2**61]), 1, OverflowError, "too large")
    refuse(total, torch.tensor([3]), 2**61, OverflowError, "too large")
    refuse(None, torch.tensor([-(2**63)]), 1, OverflowError, "too large")
    with pytest.raises(OverflowError, match="must stay below"):
        exact.merge(total, exact.add_term(None, torch.tensor([2**61]), 1))


@pytest.mark.parametrize(
    ("term", "match"),
    [
        (
            {"a": torch.ones(3), "z": torch.ones(1)},
            r"a tensor of torch.float32 with shape \(1,\) where .* shape \(3,\) belongs",
        ),
        ({"a": torch.ones(3), "z": torch.ones(3, 1)}, r"shape \(3, 1\)"),
        (
            {"a": torch.ones(3), "z": torch.ones(3, dtype=torch.int64)},
            r"torch.int64 with shape \(3,\) where a tensor of torch.float32",
        ),
        ({"a": torch.ones(3), "z": torch.ones(3, dtype=torch.float64)}, r"torch.float64"),
        ({"a": torch.ones(3), "z": 1.0}, r"a client sent a number where a tensor"),
        ({"a": torch.ones(3), "z": "text"}, r"a client sent a str where a tensor"),
        ({"a": torch.ones(3)}, r"the trees differ in \['z'\]"),
        ({"a": torch.ones(3), "z": torch.ones(3), "y": 1.0}, r"the trees differ in \['y'\]"),
    ],
)
def test_what_clients_send_must_be_of_one_kind(term: dict[str, Any], match: str):
    total = exact.add_term(None, {"a": torch.ones(3), "z": torch.ones(3)}, 1)
    refuse(total, term, 1, ValueError, match)
    if term.get("z") != "text":
        with pytest.raises(ValueError, match=r"differ|where"):
            exact.merge(total, exact.add_term(None, term, 1))


def test_a_tensor_where_a_number_belongs_is_refused():
    refuse(
        exact.add_term(None, {"a": torch.ones(3), "z": 1.0}, 1),
        {"a": torch.ones(3), "z": torch.ones(1)},
        1,
        ValueError,
        "where a number",
    )
    refuse(None, {"a": torch.ones(3), "z": "text"}, 1, ValueError, "a client sent a str where a number belongs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("weights", [[3.0, 3.0, 3.0], [1.0, 0.0, 250.0]])
def test_a_stack_of_terms_adds_what_its_rows_add(dtype, weights):
    draw = torch.Generator().manual_seed(0)
    stacked = {
        "wide": (torch.randn(3, 70_001, generator=draw) * 3).to(dtype),
        "deep": {"scalar": torch.randn(3, generator=draw).to(dtype), "empty": torch.zeros(3, 0).to(dtype)},
        "number": np.array([0.1, 0.2, float("1e-30")]),
    }
    rows = [
        {
            "wide": stacked["wide"][k],
            "deep": {name: leaf[k] for name, leaf in stacked["deep"].items()},
            "number": float(stacked["number"][k]),
        }
        for k in range(3)
    ]
    one_by_one = total_of([(row, weight) for row, weight in zip(rows, weights, strict=True)])
    assert_same_bits(exact.value(exact.add_stack(None, stacked, weights)), exact.value(one_by_one))
    again = exact.add_stack(exact.add_term(None, rows[0], 2.0), stacked, weights)
    assert_same_bits(exact.value(again), exact.value(exact.merge(total_of([(rows[0], 2.0)]), one_by_one)))


def test_a_bad_row_leaves_the_sum_of_a_stack_as_it_was():
    total = exact.add_term(None, {"a": torch.ones(2), "z": torch.ones(2)}, 1)
    stacked = {"a": torch.ones(2, 2), "z": torch.tensor([[1.0, 1.0], [1.0, float("nan")]])}
    with pytest.raises(OverflowError, match="reaches nan"):
        exact.add_stack(total, stacked, [1, 1])
    with pytest.raises(ValueError, match="needs whole ones"):
        exact.add_stack(total, stacked, [1, 0.5])
    with pytest.raises(ValueError, match="belongs"):
        exact.add_stack(total, {"a": torch.ones(2, 2), "z": torch.ones(2, 3)}, [1, 1])
    assert_same_bits(exact.value(total), {"a": torch.ones(2), "z": torch.ones(2)})
