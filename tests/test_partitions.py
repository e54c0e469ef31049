"""Laws of partitions: disjoint, within range, complete, seeded; and each scheme's own promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.data import PARTITIONS, Dataset, Partition
from fedray.data.partitions import by_column, classes_per_client, dirichlet, iid, quantity_skew, shards
from fedray.errors import DataError


def dataset(labels, num_classes: int | None = None, **columns) -> Dataset:
    y = np.asarray(labels, np.int64)
    classes = tuple(f"class {k}" for k in range(num_classes or int(y.max()) + 1))
    train = {"x": np.zeros((len(y), 2), np.float32), "y": y, **columns}
    return Dataset("toy", train, train, classes, (0.0,), (1.0,))


def balanced(n: int = 600, num_classes: int = 10) -> Dataset:
    y = np.arange(n) % num_classes
    return dataset(y, speaker=np.array([f"s{j // 7}" for j in range(n)]))


OPTIONS = {name: {"num_clients": 20} for name in PARTITIONS} | {"by_column": {"column": "speaker", "num_clients": 20}}


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_partition_is_complete_and_disjoint_and_no_client_is_empty(name):
    data = balanced()
    partition = PARTITIONS[name](data, 0, **OPTIONS[name])
    assert np.array_equal(np.sort(partition.indices), np.arange(600))
    assert partition.num_clients == 20
    assert partition.sizes.min() >= 1
    assert partition.indices.dtype == partition.offsets.dtype == np.int64


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_seed_decides(name):
    one, same, other = (PARTITIONS[name](balanced(), seed, **OPTIONS[name]) for seed in (1, 1, 2))
    assert np.array_equal(one.indices, same.indices)
    assert np.array_equal(one.offsets, same.offsets)
    assert not np.array_equal(one.indices, other.indices)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=150),
    num_clients=st.integers(1, 40),
    seed=st.integers(0, 2**63),
    alpha=st.floats(1e-320, 1e6),
    name=st.sampled_from(["iid", "dirichlet", "shards", "classes_per_client", "quantity_skew"]),
)
def test_whatever_the_data_a_partition_is_disjoint_or_refused(labels, num_clients, seed, alpha, name):
    options = {"dirichlet": {"alpha": alpha}, "quantity_skew": {"beta": alpha}}.get(name, {})
    data = dataset(labels, 7)
    try:
        partition = PARTITIONS[name](data, seed, num_clients=num_clients, **options)
    except ValueError as error:
        if num_clients * 2 <= len(labels) and name != "classes_per_client":
            raise error
        return
    owners = np.bincount(partition.indices, minlength=len(labels))
    assert owners.max() == 1
    if name != "classes_per_client":
        assert owners.min() == 1
    assert partition.num_clients == num_clients
    assert partition.sizes.min() >= 1
    for client in range(num_clients):
        assert (np.diff(partition.client(client)) > 0).all()


def test_iid_and_shard_sizes_differ_by_one_at_most():
    data = balanced(607)
    assert set(iid(data, 0, 20).sizes) == {30, 31}
    assert np.ptp(shards(data, 0, 20, shards_per_client=3).sizes) <= 3


def test_a_client_of_shards_holds_few_classes():
    counts = shards(balanced(), 0, 20, shards_per_client=2).label_counts(balanced().train["y"], 10)
    assert ((counts > 0).sum(axis=1) <= 2).all()
    assert (counts.sum(axis=1) == 30).all()


def test_the_smaller_alpha_the_fewer_classes_a_client_holds():
    data = balanced(6000)
    held = [
        (dirichlet(data, 0, 50, alpha).label_counts(data.train["y"], 10) > 0).sum(axis=1).mean()
        for alpha in (0.001, 0.1, 1.0, 1000.0)
    ]
    assert held == sorted(held)
    assert held[0] < 1.5
    assert held[-1] == 10


def test_under_the_capacity_rule_a_full_client_gets_no_further_class():
    data = balanced(6000)
    counts = dirichlet(data, 3, 30, 0.2, fill_empty=False, min_size=0).label_counts(data.train["y"], 10)
    before = np.cumsum(counts, axis=1) - counts
    assert not counts[before >= 6000 / 30].any()
    plain = dirichlet(data, 3, 30, 0.2, balanced=False, fill_empty=False, min_size=0)
    plain_counts = plain.label_counts(data.train["y"], 10)
    assert plain_counts[np.cumsum(plain_counts, axis=1) - plain_counts >= 6000 / 30].any()


def test_min_size_is_redrawn_for_and_given_up_with_a_message():
    data = balanced(1000)
    assert dirichlet(data, 0, 20, 0.5, min_size=10).sizes.min() >= 10
    with pytest.raises(
        ValueError, match=r"^min_size is 49; in 7 draws the smallest of 20 clients had at best \d+ of 1000"
    ):
        dirichlet(data, 0, 20, 0.1, min_size=49, max_tries=7)
    with pytest.raises(
        ValueError, match=r"^num_clients is 20 with 51 each \(min_size\); toy has 1000 training examples"
    ):
        dirichlet(data, 0, 20, 0.1, min_size=51)


def test_fill_empty_leaves_no_client_empty_and_can_be_switched_off():
    data = balanced(1000)
    assert dirichlet(data, 0, 1000, 0.3).sizes.tolist() == [1] * 1000
    assert dirichlet(data, 0, 500, 0.3, min_size=0, fill_empty=False).sizes.min() == 0


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-9])
def test_a_vanishing_alpha_gives_each_class_to_one_client(alpha):
    data = balanced(1000)
    counts = dirichlet(data, 0, 100, alpha, fill_empty=False, min_size=0).label_counts(data.train["y"], 10)
    assert ((counts > 0).sum(axis=0) == 1).all()
    assert ((counts > 0).sum(axis=1) <= 1).all()  # the capacity rule: nobody gets a second class


def test_ten_thousand_clients_are_counted_exactly():
    data = balanced(60_000)
    partition = dirichlet(data, 0, 10_000, 0.3)
    counts = partition.label_counts(data.train["y"], 10)
    assert counts.shape == (10_000, 10)
    assert np.array_equal(counts.sum(axis=1), partition.sizes)
    assert (counts.sum(axis=0) == 6000).all()
    some = partition.client(1234)
    assert np.array_equal(counts[1234], np.bincount(data.train["y"][some], minlength=10))


@pytest.mark.parametrize(("num_clients", "k"), [(20, 3), (5, 2), (3, 4), (60, 1), (7, 10)])
def test_each_client_holds_exactly_k_classes_and_holders_are_even(num_clients, k):
    data = balanced()
    partition = classes_per_client(data, 0, num_clients, k)
    counts = partition.label_counts(data.train["y"], 10)
    assert ((counts > 0).sum(axis=1) == k).all()
    holders = (counts > 0).sum(axis=0)
    assert np.ptp(holders) <= 1
    assert holders.min() >= 1
    for column in counts.T:
        assert np.ptp(column[column > 0]) <= 1
    assert len(partition.indices) == 600


def test_a_class_that_nobody_can_hold_is_left_out():
    partition = classes_per_client(balanced(), 0, 2, 3)
    assert len(partition.indices) == 6 * 60


def test_natural_clients_bear_the_names_of_the_values():
    data = dataset(
        [0, 1, 1, 0, 1], speaker=np.array(["eve", "bob", "eve", "ann", "bob"]), room=np.array([3, 3, 1, 1, 3])
    )
    partition = by_column(data, 0, "speaker")
    assert partition.names == ("ann", "bob", "eve")
    assert [partition.client(i).tolist() for i in range(3)] == [[3], [1, 4], [0, 2]]
    assert by_column(data, 0, "room").names == ("1", "3")
    assert by_column(data, 0, "y").names == ("class 0", "class 1")


def test_values_are_dealt_out_whole():
    data = balanced()
    partition = by_column(data, 0, "speaker", num_clients=10)
    owner = np.empty(600, int)
    owner[partition.indices] = np.repeat(np.arange(10), partition.sizes)
    values = [len(set(owner[data.train["speaker"] == s])) for s in set(data.train["speaker"])]
    assert set(values) == {1}
    assert partition.names == ()


def test_quantity_skew_skews_sizes_but_not_labels():
    data = balanced(20_000)
    for options in ({"beta": 0.3}, {"law": "lognormal", "sigma": 1.5}):
        partition = quantity_skew(data, 0, 10, min_size=5, **options)
        assert partition.sizes.min() >= 5
        assert partition.sizes.max() > 5 * partition.sizes.min()
        shares = partition.label_counts(data.train["y"], 10)[partition.sizes.argmax()] / partition.sizes.max()
        assert np.abs(shares - 0.1).max() < 0.03
    assert np.ptp(quantity_skew(data, 0, 7, law="lognormal", sigma=0.0).sizes) <= 1


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        (iid, {"num_clients": 0}, "num_clients is 0; it must be >= 1"),
        (iid, {"num_clients": 601}, "num_clients is 601; toy has 600 training examples, enough for 600"),
        (dirichlet, {"num_clients": 5, "alpha": 0.0}, "alpha is 0.0; it must be > 0 and finite"),
        (dirichlet, {"num_clients": 5, "alpha": float("nan")}, "alpha is nan; it must be > 0"),
        (dirichlet, {"num_clients": 5, "alpha": float("inf")}, "alpha is inf; it must be > 0"),
        (dirichlet, {"num_clients": 5, "min_size": -1}, "min_size is -1; it must be >= 0"),
        (dirichlet, {"num_clients": 5, "max_tries": 0}, "max_tries is 0; it must be >= 1"),
        (shards, {"num_clients": 5, "shards_per_client": 0}, "shards_per_client is 0; it must be >= 1"),
        (shards, {"num_clients": 500}, r"num_clients is 500 with 2 each \(shards_per_client\); toy has 600"),
        (classes_per_client, {"num_clients": 5, "num_classes": 11}, r"num_classes is 11; it must be 1\.\.10"),
        (classes_per_client, {"num_clients": 400}, "num_clients is 400; 80 of them hold class 'class 0', which has 60"),
        (by_column, {"column": "speakr"}, "column is 'speakr', which toy does not have; did you mean 'speaker'?"),
        (by_column, {"column": "writer"}, "column is 'writer', which toy does not have; toy has speaker, y"),
        (by_column, {"column": "speaker", "num_clients": 87}, "num_clients is 87; column 'speaker' has 86 values"),
        (quantity_skew, {"num_clients": 5, "beta": 0.0}, "beta is 0.0; it must be > 0"),
        (quantity_skew, {"num_clients": 5, "sigma": -1.0}, "sigma is -1.0; it must be >= 0"),
    ],
)
def test_an_impossible_option_is_named(scheme, options, message):
    with pytest.raises(ValueError, match=r"^" + message):
        scheme(balanced(), 0, **options)


def test_a_partition_survives_disk(tmp_path):
    saved = by_column(balanced(), 0, "speaker")
    saved.save(tmp_path / "partition.npz", {"column": "speaker", "seed": 0})
    loaded = Partition.load(tmp_path / "partition.npz")
    assert np.array_equal(saved.indices, loaded.indices)
    assert np.array_equal(saved.offsets, loaded.offsets)
    assert saved.names == loaded.names
    iid(balanced(), 0, 3).save(tmp_path / "plain.npz")
    assert Partition.load(tmp_path / "plain.npz").names == ()
    saved.save(tmp_path / "again.npz", {"column": "speaker", "seed": 0})
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "partition.npz").read_bytes()


def test_a_bad_partition_file_names_itself(tmp_path):
    path = tmp_path / "partition.npz"
    with pytest.raises(DataError, match=r"partition.npz does not exist"):
        Partition.load(path)
    iid(balanced(), 0, 3).save(path)
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[:200], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"partition.npz is no readable partition"):
            Partition.load(path)
    np.savez(path, indices=np.arange(3))
    with pytest.raises(DataError, match=r"partition.npz is no readable partition"):
        Partition.load(path)


def test_a_partition_is_read_only_and_checked():
    partition = iid(balanced(), 0, 3)
    with pytest.raises(ValueError, match=r"read-only"):
        partition.client(0)[0] = 1
    for client in (-1, 3):
        with pytest.raises(IndexError, match=f"client {client} does not exist; there are clients 0..2"):
            partition.client(client)
    with pytest.raises(ValueError, match=r"offsets must rise from 0 to 3"):
        Partition(np.arange(3), np.array([0, 2]))
    with pytest.raises(ValueError, match=r"names has 1 entries for 2 clients"):
        Partition(np.arange(3), np.array([0, 2, 3]), ("a",))
