"""Data sets: what each loader yields, and that every bad file names itself."""

import gzip
import importlib
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from needs import asset

from fedray.data import DATASETS, Dataset
from fedray.data.dataset import make_dataset, moments, split_by_class, tidy_inputs
from fedray.data.datasets import digits, fashion_mnist, mnist, npz, public_split, subset
from fedray.errors import DataError

RNG = np.random.default_rng(0)


# --- the value


def test_a_subset_is_a_fixed_part_with_the_wholes_normalisation():
    whole = digits()
    part = subset(whole, train=100, test=30)
    assert (len(part.train["y"]), len(part.test["y"])) == (100, 30)
    assert (part.mean, part.std, part.classes) == (whole.mean, whole.std, whole.classes)
    for split in ("train", "test"):
        rows = {x.tobytes(): y for x, y in zip(*(getattr(whole, split)[name] for name in "xy"), strict=True)}
        assert all(rows[x.tobytes()] == y for x, y in zip(*(getattr(part, split)[name] for name in "xy"), strict=True))
    assert np.array_equal(part.train["x"], subset(whole, train=100).train["x"])
    assert not np.array_equal(part.train["x"], subset(whole, train=100, seed=1).train["x"])
    assert np.array_equal(subset(whole).train["x"], whole.train["x"])


def test_settings_can_be_chosen_on_training_examples_outside_of_the_part():
    plain = digits()
    columns = {s: {**getattr(plain, s), "row": np.arange(len(getattr(plain, s)["y"]))} for s in ("train", "test")}
    whole = replace(plain, **columns)
    part, held_out = (subset(whole, train=100, test=30, test_from=source) for source in ("test", "train"))
    assert all(np.array_equal(held_out.train[name], part.train[name]) for name in part.train)
    tested = held_out.test["row"]
    assert len(tested) == 30
    assert not set(tested) & set(held_out.train["row"])
    assert np.array_equal(held_out.test["x"], plain.train["x"][tested])
    assert len(subset(whole, train=100, test_from="train").test["y"]) == len(plain.train["y"]) - 100
    with pytest.raises(ValueError, match="test is 2000; 1338 training examples of digits are outside of the part"):
        subset(whole, train=100, test=2000, test_from="train")


def test_shots_are_so_many_of_each_class():
    assert np.bincount(subset(digits(), per_class=3).train["y"]).tolist() == [3] * 10
    assert len(subset(digits(), per_class=3).test["y"]) == len(digits().test["y"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train is 0; it must be between 1 and 14"),
        ({"test": 400}, "test is 400; it must be between 1 and 3"),
        ({"per_class": 200}, "per_class is 200; it must be between 1 and 139, the smallest class of digits"),
        ({"per_class": 2, "train": 20}, "per_class is 2, and train is 20; give one of the two"),
    ],
)
def test_a_part_cannot_be_larger_than_the_whole(options, message):
    with pytest.raises(ValueError, match=message):
        subset(digits(), **options)


def test_digits_are_all_there_stratified_and_fixed():
    data = digits()
    assert (data.input_shape, data.num_classes) == ((1, 8, 8), 10)
    assert len(data.train["y"]) + len(data.test["y"]) == 1797
    assert data.train["x"].max() == 255
    share = np.bincount(data.test["y"]) / (np.bincount(data.test["y"]) + np.bincount(data.train["y"]))
    assert np.abs(share - 0.2).max() < 0.01
    assert np.array_equal(data.train["x"], digits().train["x"])
    assert not np.array_equal(data.test["y"], digits(split_seed=1).test["y"])
    assert np.isclose(data.mean[0], (data.train["x"] / 255).mean())
    assert np.isclose(data.std[0], (data.train["x"] / 255).std())


def test_arrays_are_contiguous_and_read_only_and_leave_their_owner_writable():
    x = RNG.random((4, 6, 3), dtype=np.float32).transpose(2, 0, 1)
    columns = {"x": x, "y": np.array([0, 1, 1])}
    data = Dataset("toy", columns, columns, ("a", "b"), (0.0,), (1.0,))
    for array in data.train.values():
        assert array.flags.c_contiguous
        assert not array.flags.writeable
    x[0] = 1
    columns["y"][0] = 1
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again.train["x"], data.train["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, r"toy \(train\) has no column 'y'; it has \['x'\]"),
        ({"x": np.zeros((0, 2), np.float32)}, r"toy \(train\) has no examples"),
        ({"x": np.zeros((3, 2))}, r"x is float64 \(3, 2\); it must be uint8 N×C×H×W or float32"),
        ({"x": np.zeros((3, 8, 8), np.uint8)}, r"x is uint8 \(3, 8, 8\)"),
        ({"y": np.zeros(3, np.int32)}, r"y is int32 \(3,\); it must be int64"),
        ({"y": np.zeros(2, np.int64)}, "column 'y' has 2 values for 3 examples"),
        ({"y": np.array([0, 2, 1])}, r"there is a label 2; labels must be 0\.\.1"),
        ({"y": np.array([0, -1, 1])}, "there is a label -1"),
    ],
)
def test_a_wrong_column_is_named(change, message):
    columns = {"x": np.zeros((3, 2), np.float32), "y": np.zeros(3, np.int64)} | change
    columns = {k: v for k, v in columns.items() if v is not None}
    with pytest.raises(DataError, match=message):
        Dataset("toy", columns, columns, ("a", "b"), (0.0,), (1.0,))


def test_train_and_test_must_be_alike():
    def columns(d, **more):
        return {"x": np.zeros((3, d), np.float32), "y": np.zeros(3, np.int64), **more}

    with pytest.raises(DataError, match=r"examples of train and test differ: float32 \(2,\) and float32 \(3,\)"):
        Dataset("toy", columns(2), columns(3), ("a",), (0.0,), (1.0,))
    with pytest.raises(DataError, match=r"train has columns \['who', 'x', 'y'\], test has \['x', 'y'\]"):
        Dataset("toy", columns(2, who=np.zeros(3)), columns(2), ("a",), (0.0,), (1.0,))
    with pytest.raises(DataError, match=r"3 means and 1 stds for x \(2,\)"):
        Dataset("toy", columns(2), columns(2), ("a",), (0.0,) * 3, (1.0,))


def test_moments_are_those_of_the_whole_in_blocks_too():
    x = RNG.integers(0, 256, (300, 3, 64, 64), dtype=np.uint8)
    mean, std = moments(x)
    assert np.allclose(mean, (x / 255).mean(axis=(0, 2, 3)))
    assert np.allclose(std, (x / 255).std(axis=(0, 2, 3)))
    assert np.allclose(moments(x[:, 0, 0] / np.float32(7), per_channel=False)[1], (x[:, 0, 0] / 7).std())


def test_a_split_is_stratified_complete_and_keeps_groups_whole():
    y = RNG.integers(0, 5, 1000)
    train, test = split_by_class(y, 0.3, 0)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1000))
    assert np.abs(np.bincount(y[test]) - 0.3 * np.bincount(y)).max() <= 0.5
    groups = RNG.integers(0, 120, 1000)
    train, test = split_by_class(groups % 5, 0.3, 0, groups)
    assert not set(groups[train]) & set(groups[test])
    assert len(train) + len(test) == 1000
    assert 200 < len(test) < 400
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"^test_fraction is {fraction}; it must be between 0 and 1"):
            split_by_class(y, fraction, 0)
    with pytest.raises(ValueError, match=r"^test_fraction is 0\.1; it leaves no test example of 3"):
        split_by_class(np.arange(3), 0.1, 0)


def test_inputs_are_tidied():
    assert tidy_inputs(np.zeros((5, 8, 9, 3), np.uint8), "t").shape == (5, 3, 8, 9)
    assert tidy_inputs(np.zeros((5, 3, 8, 3), np.uint8), "t").shape == (5, 3, 8, 3)
    assert tidy_inputs(np.zeros((5, 3, 8, 3), np.uint8), "t", channels_last=True).shape == (5, 3, 3, 8)
    assert tidy_inputs(np.zeros((5, 8, 9), np.uint8), "t").shape == (5, 1, 8, 9)
    assert tidy_inputs(np.zeros((5, 8)), "t").dtype == np.float32
    assert tidy_inputs(np.zeros((5, 8), np.uint8), "t").dtype == np.float32
    for wrong, message in ((np.full((5, 2), np.nan), "not finite"), (np.array([["a"]]), "must be numbers")):
        with pytest.raises(DataError, match=message):
            tidy_inputs(wrong, "t")
    with pytest.raises(DataError, match=r"inputs have shape \(5,\)"):
        tidy_inputs(np.zeros(5), "t")


# --- idx files


def idx(array: np.ndarray, dimensions: int | None = None) -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes((0, 0, 8, dimensions or array.ndim)) + sizes + array.astype(np.uint8).tobytes()


IMAGES, LABELS = RNG.integers(0, 256, (30, 5, 4)), np.arange(30) % 10


@pytest.fixture
def folder(tmp_path) -> Path:
    for prefix, n in (("train", 30), ("t10k", 10)):
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(IMAGES[:n]))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(LABELS[:n]))
    return tmp_path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_files_are_read_in_every_spelling(folder, zipped, separator):
    for file in list(folder.iterdir()):
        content = gzip.compress(file.read_bytes()) if zipped else file.read_bytes()
        name = file.name.replace("-idx", f"{separator}idx") + (".gz" if zipped else "")
        file.unlink()
        (folder / name).write_bytes(content)
    for data in (mnist(str(folder)), fashion_mnist(str(folder))):
        assert np.array_equal(data.train["x"][:, 0], IMAGES)
        assert np.array_equal(data.test["y"], LABELS[:10])
        assert data.train["x"].dtype == np.uint8
    assert fashion_mnist(str(folder)).classes[9] == "Ankle boot"


def test_a_missing_folder_or_file_says_what_to_do(folder):
    with pytest.raises(
        DataError, match=r"nowhere is not a folder; .*apt-get install dataset-fashion-mnist.*task\.data\.path="
    ):
        fashion_mnist(str(folder / "nowhere"))
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"has no t10k-labels-idx1-ubyte\[\.gz\]; .*task\.data\.path="):
        mnist(str(folder))


BAD_IMAGES = {
    "is truncated: it ends within its header": idx(IMAGES)[:9],
    r"is truncated: its header announces \(30, 5, 4\), 600 bytes": idx(IMAGES)[:-1],
    "is longer than its header says": idx(IMAGES) + b"\0",
    r"is truncated: its header announces \(4294967295, 4294967295, 4294967295\)": idx(IMAGES)[:4] + b"\xff" * 12,
    "has the wrong magic number 00000801": idx(LABELS) + bytes(20),
    "has the wrong magic number 504b0304": b"PK\3\4" + bytes(20),
    r"is truncated or corrupt \(Compressed file ended": gzip.compress(idx(IMAGES))[:-20],
    r"is truncated or corrupt \(CRC check failed": gzip.compress(idx(IMAGES))[:-8] + bytes(8),
    r"is truncated or corrupt \(Error -3": gzip.compress(idx(IMAGES))[:10] + b"\xff" * 50,
    "holds 31 images but .*train-labels-idx1-ubyte holds 30 labels": idx(np.zeros((31, 5, 4))),
}


@pytest.mark.parametrize("message", BAD_IMAGES)
def test_a_bad_idx_file_names_itself(folder, message):
    (folder / "train-images-idx3-ubyte").write_bytes(BAD_IMAGES[message])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte " + message):
        mnist(str(folder))


def test_labels_out_of_range_name_the_file(folder):
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(10) + 1))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte holds a label 10; labels must be 0\.\.9"):
        mnist(str(folder))


# --- npz


def save(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_npz_with_columns_is_split_by_a_column(tmp_path):
    code = np.array([f"u{j // 4}" for j in range(200)])
    path = save(
        tmp_path / "a.npz",
        x=RNG.integers(0, 256, (200, 6, 5, 3), dtype=np.uint8),
        kind=np.arange(200) // 4 % 3,
        code=code,
        domain=np.arange(200) % 4,
        kinds=np.array(["cat", "dog", "emu"]),
    )
    data = npz(path, label="kind", classes="kinds", split_by="code")
    assert data.classes == ("cat", "dog", "emu")
    assert data.input_shape == (3, 6, 5)
    assert not set(data.train["code"]) & set(data.test["code"])
    assert set(data.train) == {"x", "y", "kind", "code", "domain"}
    assert data.name == "a"
    with pytest.raises(ValueError, match=r"^split_by is 'cod'; .* has the columns \['code', 'domain', 'kind'\]"):
        npz(path, label="kind", split_by="cod")


def test_npz_with_its_own_test_examples(tmp_path):
    arrays = {
        "x_train": RNG.random((50, 7)),
        "y_train": np.arange(50) % 3,
        "who_train": np.arange(50),
        "x_test": RNG.random((20, 7)),
        "y_test": np.arange(20) % 4,
        "who_test": np.arange(20),
        "extra_train": np.arange(50),
    }
    data = npz(save(tmp_path / "a.npz", **arrays))
    assert data.classes == ("0", "1", "2", "3")
    assert np.array_equal(data.test["who"], np.arange(20))
    assert set(data.train) == {"x", "y", "who"}  # what only one side has is no column
    assert np.allclose(data.mean, arrays["x_train"].mean(axis=0))
    one = save(tmp_path / "one.npz", x=arrays["x_train"], y=np.array(["b", "a"] * 25))
    two = save(tmp_path / "two.npz", x=arrays["x_test"], y=np.array(["a", "c"] * 10))
    data = npz(one, test_path=two)
    assert data.classes == ("a", "b", "c")
    assert data.test["y"].tolist() == [0, 2] * 10


def test_a_bad_npz_names_itself(tmp_path):
    x, y = np.zeros((10, 3)), np.arange(10) % 2
    good = save(tmp_path / "good.npz", x=x, y=y)
    with pytest.raises(DataError, match=r"gone\.npz does not exist"):
        npz(str(tmp_path / "gone.npz"))
    whole = Path(good).read_bytes()
    damaged = whole[:80] + bytes(20) + whole[100:]
    for content in (b"", b"junk", whole[:100], whole[:-40], damaged, pickle.dumps(1)):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.npz (is|holds|has)"):
            npz(str(tmp_path / "bad.npz"))
    np.save(tmp_path / "single.npy", x)
    with pytest.raises(DataError, match=r"single\.npy is a single \.npy array"):
        npz(str(tmp_path / "single.npy"))
    with pytest.raises(DataError, match=r"objects\.npz holds pickled objects"):
        npz(save(tmp_path / "objects.npz", x=x, y=np.array([{}] * 10)))
    with pytest.raises(DataError, match=r"has no array 'label'; it has x, y: give task\.data\.label=NAME"):
        npz(good, label="label")
    with pytest.raises(DataError, match=r"'x' has shape \(10, 3\) but 'y' \(9,\)"):
        npz(save(tmp_path / "short.npz", x=x, y=y[:9]))
    with pytest.raises(DataError, match=r"there is a label -1; labels must be 0\.\.1"):
        npz(save(tmp_path / "negative.npz", x=x, y=1 - 2 * y))
    with pytest.raises(DataError, match="labels are float64"):
        npz(save(tmp_path / "float.npz", x=x, y=y / 2))
    with pytest.raises(DataError, match="label 'z' is not among the classes"):
        npz(save(tmp_path / "unknown.npz", x=x, y=np.array(["z"] * 10), classes=np.array(["a", "b"])))


# --- the package


def test_the_package_loads_without_heavy_libraries():
    code = "import sys, fedray.data, fedray.samplers; print(*sys.modules)"
    import subprocess

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"ray", "torch", "datasets", "PIL", "soundfile", "sklearn", "matplotlib", "scipy"} & set(loaded)


def test_every_registered_function_documents_each_option():
    import inspect

    modules = [importlib.import_module(name) for name in ("fedray.data", "fedray.samplers")]
    registries = [modules[0].DATASETS, modules[0].PARTITIONS, modules[1].SAMPLERS]
    for name, function in (item for registry in registries for item in registry.items()):
        options = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.POSITIONAL_ONLY]
        for option in options:
            assert f"    {option}: " in (function.__doc__ or ""), (name, option)


# --- real data, where it is


def test_emoji_from_an_npz():
    data = npz(asset("emoji64.npz"), label="group", classes="groups", split_by="code")
    assert len(data.train["y"]) + len(data.test["y"]) == 7074
    assert data.input_shape == (3, 64, 64)
    assert "flags" in data.classes
    assert not set(data.train["code"]) & set(data.test["code"])


def test_fashion_mnist_where_debian_puts_it():
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    data = DATASETS["fashion_mnist"]()
    assert data.train["x"].shape == (60_000, 1, 28, 28)
    assert np.bincount(data.test["y"]).tolist() == [1000] * 10
    assert np.isclose(data.mean[0], 0.2860, atol=1e-4)
    assert np.isclose(data.std[0], 0.3530, atol=1e-4)


def test_public_and_private_examples_are_all_and_none_twice():
    whole = digits()
    parts = [public_split(whole, 300, "public"), public_split(whole, 300, "private")]
    assert [len(part.train["y"]) for part in parts] == [300, len(whole.train["y"]) - 300]
    together = np.concatenate([part.train["x"].reshape(len(part.train["x"]), -1) for part in parts])
    everything = whole.train["x"].reshape(len(whole.train["x"]), -1)
    assert np.array_equal(together[np.lexsort(together.T)], everything[np.lexsort(everything.T)])
    assert all(np.array_equal(part.test["x"], whole.test["x"]) and part.mean == whole.mean for part in parts)


def test_public_examples_can_be_parted_by_a_column():
    columns = {"x": np.zeros((6, 2), np.float32), "y": np.zeros(6, np.int64), "writer": np.array(list("aabbcc"))}
    of = make_dataset("w", columns, columns, ["0"])
    public = public_split(of, 2, "public", by="writer")
    private = public_split(of, 2, "private", by="writer")
    assert len(set(public.train["writer"])) == 2
    assert set(public.train["writer"]) | set(private.train["writer"]) == set("abc")
    assert set(public.train["writer"]).isdisjoint(private.train["writer"])
    with pytest.raises(ValueError, match=r"public is 3; it must be between 1 and 2"):
        public_split(of, 3, by="writer")
    with pytest.raises(ValueError, match=r"by is 'who'; w has the columns writer, x, y"):
        public_split(of, 1, by="who")
