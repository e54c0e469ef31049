"""Hub-style data sets, all offline: folders of pictures and sounds, parquet files, and what is not there."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from needs import asset

from fedray.data.hub import cifar10, hub
from fedray.errors import DataError

os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported, which is inside the loaders


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of class folders; cats are grey or black, dogs are grey or white."""
    image = pytest.importorskip("PIL.Image")
    for name, level in (("cat", 0), ("dog", 255)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for j in range(10):
            array = np.full((6, 5), level if j % 2 else 128, np.uint8)
            image.fromarray(array).save(tmp_path / "pictures" / name / f"{j}.png")
    pytest.importorskip("datasets")
    return tmp_path / "pictures"


def test_a_folder_of_pictures_leaves_no_droppings(pictures, tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data = hub(str(pictures), test_fraction=0.3)
    assert data.name == "pictures"
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (1, 6, 5)
    assert (len(data.train["y"]), len(data.test["y"])) == (14, 6)
    assert set(np.unique(data.train["x"][data.train["y"] == 0])) == {0, 128}
    assert not list((tmp_path / "here").iterdir())
    assert hub(str(pictures), image_size=8, image_mode="RGB").input_shape == (3, 8, 8)
    Image.new("RGB", (5, 6), (255, 0, 0)).save(pictures / "cat" / "red.png")
    mixed = hub(str(pictures), test_fraction=0.3)
    assert mixed.input_shape == (3, 6, 5)
    assert len(mixed.train["y"]) + len(mixed.test["y"]) == 21


def test_pictures_of_several_sizes_or_broken_ones_are_named(pictures):
    from PIL import Image

    Image.new("L", (9, 9)).save(pictures / "dog" / "large.png")
    with pytest.raises(DataError, match=r"image \d+ is 9×9, others are 5×6; give task\.data\.image_size=PIXELS"):
        hub(str(pictures))
    assert hub(str(pictures), image_size=4).input_shape == (1, 4, 4)
    whole = (pictures / "cat" / "0.png").read_bytes()
    for content in (b"junk", whole[:-25]):
        (pictures / "cat" / "0.png").write_bytes(content)
        with pytest.raises(DataError, match=r"image 0 \(.*cat.0\.png\) cannot be decoded"):
            hub(str(pictures), image_size=4)
    with pytest.raises(ValueError, match=r"^image_size is 0; it must be > 0"):
        hub(str(pictures), image_size=0)


def test_train_and_test_folders_are_splits(pictures, tmp_path):
    (tmp_path / "both").mkdir()
    for split in ("train", "test", "validation"):
        (tmp_path / "both" / split).mkdir()
        for name in ("cat", "dog"):
            target = tmp_path / "both" / split / name
            target.mkdir()
            for j in range(3 if split == "train" else 2):
                (target / f"{j}.png").write_bytes((pictures / name / f"{j}.png").read_bytes())
    path = str(tmp_path / "both")
    assert len(hub(path).train["y"]) == 6
    assert len(hub(path).test["y"]) == 4
    assert len(hub(path, test_split="train", train_split="validation").test["y"]) == 6
    with pytest.raises(DataError, match=r"both has no split 'dev' \(test_split\); it has test, train, validation"):
        hub(path, test_split="dev")


def test_a_folder_of_sounds_is_cut_padded_and_resampled(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("datasets")
    for name, level in (("no", 0.25), ("yes", 0.5)):
        (tmp_path / name).mkdir()
        for j in range(5):
            soundfile.write(tmp_path / name / f"{j}.wav", np.full((800, 2), level, np.float32), 8000, subtype="FLOAT")
    path = str(tmp_path)
    data = hub(path)
    assert data.input_shape == (800,)
    assert data.train["x"].dtype == np.float32
    assert np.allclose(data.train["x"], np.where(data.train["y"] == 1, 0.5, 0.25)[:, None])
    assert len(data.mean) == 1
    longer = hub(path, seconds=0.15, sample_rate=4000)
    assert longer.input_shape == (600,)
    assert not longer.train["x"][:, 400:].any()
    assert longer.train["x"][:, 200].min() > 0.2
    soundfile.write(tmp_path / "no" / "short.wav", np.zeros(400), 8000)
    with pytest.raises(DataError, match=r"clips of 0\.05 to 0\.10 seconds; give task\.data\.seconds=LENGTH"):
        hub(path)
    soundfile.write(tmp_path / "no" / "short.wav", np.zeros(1600), 16000)
    with pytest.raises(DataError, match=r"clips of \[8000, 16000\] Hz; give task\.data\.sample_rate=HERTZ"):
        hub(path)
    assert hub(path, sample_rate=8000).input_shape == (800,)
    (tmp_path / "no" / "short.wav").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"clip \d+ \(.*short\.wav\) cannot be decoded"):
        hub(path)


@pytest.fixture
def table(tmp_path):
    """Writes columns (and features) as a parquet file; gives its path."""
    datasets = pytest.importorskip("datasets")

    def write(name: str = "t.parquet", features=None, **columns) -> str:
        built = datasets.Dataset.from_dict(columns, features=features and datasets.Features(features))
        built.to_parquet(tmp_path / name)
        return str(tmp_path / name)

    return write


def test_a_parquet_file_of_numbers_with_columns_to_partition_by(table):
    import datasets

    path = table(
        vector=[[float(j), 1.0, 2.0] for j in range(40)],
        label=["yes", "no"] * 20,
        speaker=["ann", "bob", "cid", "dan"] * 10,
        age=list(range(40)),
        gap=[None, *range(39)],
        essay=["word " * 100] * 40,
        weight=[0.5] * 40,
    )
    data = hub(path, split_by="speaker", test_fraction=0.5)
    assert data.classes == ("no", "yes")
    assert data.input_shape == (3,)
    assert set(data.train) == {"x", "y", "speaker", "age"}
    assert not set(data.train["speaker"]) & set(data.test["speaker"])
    assert "essay" in hub(path, columns=["essay"]).train
    with pytest.raises(ValueError, match=r"^columns names 'speakr'"):
        hub(path, columns=["speakr"])
    with pytest.raises(DataError, match="column 'gap' has 1 missing values"):
        hub(path, columns=["gap"])
    with pytest.raises(DataError, match="column 'gap' has 1 missing values"):
        hub(path, label="gap")
    with pytest.raises(ValueError, match=r"^label is 'lable'; .* has the columns vector, label"):
        hub(path, label="lable")
    with pytest.raises(ValueError, match=r"^x is 'vectr'; "):
        hub(path, x="vectr")
    coarse = datasets.ClassLabel(names=["a", "b"])
    features = {"v": datasets.Sequence(datasets.Value("float32")), "fine": coarse, "coarse": coarse}
    path = table("two.parquet", features, v=[[1.0], [2.0]] * 10, fine=[0, 1] * 10, coarse=[1, 0] * 10)
    with pytest.raises(DataError, match=r"several columns of classes: fine, coarse; choose with task\.data\.label"):
        hub(path)
    assert set(hub(path, label="fine").train["coarse"]) == {"a", "b"}
    with pytest.raises(DataError, match="differ in length"):
        hub(table("ragged.parquet", v=[[1.0], [1.0, 2.0]] * 5, label=[0, 1] * 5))
    with pytest.raises(DataError, match="no column of images, sounds or lists among a, label"):
        hub(table("scalar.parquet", a=[1, 2] * 5, label=[0, 1] * 5))
    with pytest.raises(DataError, match=r"no column of classes; choose with task\.data\.label among v, target"):
        hub(table("target.parquet", v=[[1.0]] * 10, target=[0, 1] * 5))


def test_what_is_not_there_says_so(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"/nowhere/cifar10 does not exist; give a folder"):
        hub("/nowhere/cifar10")
    with pytest.raises(
        DataError, match=r"some-body/no-such-data is no local folder .* unreachable or offline .*task\.data\.path="
    ):
        hub("some-body/no-such-data")
    with pytest.raises(DataError, match=r"cannot be read as a data set .*is it empty or corrupt"):
        hub(str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"cannot be read as a data set"):
        hub(str(tmp_path))
    (tmp_path / "a.zip").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"a\.zip is a \.zip file; hub reads \.parquet"):
        hub(str(tmp_path / "a.zip"))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package 'datasets': pip install 'fedray\[hub\]'"):
        hub("anything")


# --- real data, where it is


def test_cifar10_from_a_local_folder():
    data = cifar10(asset("cifar10"))
    assert data.train["x"].shape == (50_000, 3, 32, 32)
    assert data.test["x"].shape == (10_000, 3, 32, 32)
    assert np.bincount(data.train["y"]).tolist() == [5000] * 10
    assert np.allclose(data.mean, (0.491, 0.482, 0.447), atol=0.002)


def test_fsdd_from_a_local_folder():
    data = hub(asset("fsdd"), seconds=0.5)
    assert data.train["x"].shape == (2700, 4000)
    assert len(set(data.train["speaker"])) == 6
    assert data.classes[7] == "seven"
