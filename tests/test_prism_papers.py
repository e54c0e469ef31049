"""PRISM's paper configurations, on tiny data and a tiny extractor of the same classes, in all their settings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from serial_runs import without_page

from fedray import config
from fedray.data.hub import hub
from fedray.errors import DataError
from fedray.experiment import plan
from fedray.models.feature_maps import Vgg19, vgg19_bn
from fedray.models.image_generators import masked_resnet_generator
from fedray.runs import run, shipped

SETTINGS = {
    "non-IID": [],
    "IID": ["task.partition={name: iid, num_clients: 10}"],
    "Dirichlet": ["task.partition={name: dirichlet, num_clients: 10, alpha: 0.5, min_size: 2}"],  # of few pictures
    "DP": ["algorithm.noise=release", "algorithm.clip=0.1"],
    "PRISM†": ["algorithm.mada=none"],
    "PRISM*": ["algorithm.alpha=0.8"],
}
NAMES = ("mnist", "fmnist", "celeba", "cifar10")


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> Path:
    """VGG19 of two channels where the real one has 64, as timm saves it: beside a head, in a folder."""
    folder = tmp_path_factory.mktemp("vgg19")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file({**Vgg19(2).state_dict(), "head.fc.bias": torch.zeros(10)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Pictures under the columns of the hub's data sets."""
    datasets = pytest.importorskip("datasets")
    draw, folders = np.random.default_rng(0), {}
    for name, shape in (("mnist", (28, 28)), ("fmnist", (28, 28)), ("cifar10", (32, 32, 3)), ("celeba", (218, 178, 3))):
        folders[name] = tmp_path_factory.mktemp(name)
        for split, count in (("train", 80), ("test", 16)):
            columns = {datasets_x(name): [draw.integers(0, 256, shape).astype(np.uint8) for _ in range(count)]}
            features = {datasets_x(name): datasets.Image()}
            if name == "celeba":
                columns |= {"celeb_id": list(range(count)), "Male": [k % 3 == 0 for k in range(count)]}
                features |= {"celeb_id": datasets.Value("int64"), "Male": datasets.Value("bool")}
            else:
                columns |= {"label": [k % 10 for k in range(count)]}
                features |= {"label": datasets.ClassLabel(num_classes=10)}
            table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            table.to_parquet(folders[name] / f"{split}.parquet")
    return folders


def datasets_x(name: str) -> str:
    return "img" if name == "cifar10" else "image"


def tiny(name: str, data: dict[str, Path], vgg: Path) -> list[str]:
    at = "task.data.of.path" if name == "celeba" else "task.data.path"
    few = ["task.data.per_class=20", "task.data.test=12"] if name == "celeba" else []
    few += ["rounds=1", "evaluate_every=0", "task.model.width=2", "task.model.latent=3", "task.neighbour_samples=10"]
    few += ["algorithm.local_steps=2", "algorithm.batch_size=4", "backend=serial"]
    return [f"{at}={data[name]}", f"task.features.path={vgg}", *few]


@pytest.mark.parametrize("name", NAMES)
def test_a_papers_configuration_runs_in_all_its_settings(name, data, vgg, tmp_path):
    settings = SETTINGS if name == "mnist" else {key: SETTINGS[key] for key in ("non-IID", "IID", "DP")}
    for number, (setting, overrides) in enumerate(settings.items()):
        changed = [*tiny(name, data, vgg), *overrides]
        if (name, setting) == ("celeba", "IID"):
            changed.append("task.data.per_class=null")
        out = tmp_path / str(number)
        with without_page():
            found = run(shipped()[f"prism/paper_{name}"], changed, out).final
        assert found["clients_sampled"] == 10, setting
        assert np.isfinite(found["frechet_distance"]), setting
        assert 0 <= found["fixed_precision"] <= 1, setting
        assert ("epsilon" in found) == (setting == "DP")
        assert (found["mada_weight"] == 1) == (setting == "PRISM†")
        assert '"VGG19-BN of width 2"' in (out / "evaluation.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_papers_configuration_has_the_authors_numbers(name):
    values = config.read(shipped()[f"prism/paper_{name}"])
    assert (values["rounds"], values["cohort"], values["evaluate_every"], values["seed"]) == (500, 10, 10, 30)
    told = ("local_optimizer", "local_lr", "local_beta1", "local_steps", "batch_size")
    assert [values["algorithm"][key] for key in told] == ["adam", 0.1, 0.5, 100, 64]
    assert values["task"]["neighbour_samples"] == 10_000
    model = {key: value for key, value in values["task"]["model"].items() if key != "name"}
    with torch.device("meta"):
        generator = masked_resnet_generator((1 if name.endswith("mnist") else 3, 32, 32), **model)
    weights = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    assert weights == (3_543_616 if name.endswith("mnist") else 3_544_768)
    assert values["task"]["partition"]["num_clients"] == 10


def test_shards_give_a_client_pictures_of_one_sex_or_of_few_classes(data, vgg):
    for name, most in (("celeba", 1), ("mnist", 4)):
        made = plan(config.read(shipped()[f"prism/paper_{name}"], tiny(name, data, vgg)))
        counts = made.experiment.task.holdings()["label_counts"]
        assert (counts.sum(1) == (4 if name == "celeba" else 8)).all()
        assert (counts > 0).sum(1).max() <= most
        if name == "celeba":
            assert counts.sum(0).tolist() == [20, 20]


def test_at_the_papers_alpha_all_but_the_first_layer_send_scores(data, vgg, tmp_path):
    """What the released selection comes to in effect: 2,495,040 or 2,496,192 of the weights are averaged as scores."""
    from fedray.bits import split

    with torch.device("meta"):
        generator = masked_resnet_generator((1, 32, 32))
    masked, scored = split({name: p for name, p in generator.named_parameters() if p.requires_grad}, 1 - 0.8)
    assert [tuple(p.shape) for p in masked.values()] == [(128, 512, 4, 4)]
    assert sum(p.numel() for p in scored.values()) == 2_495_040


def test_vgg_comes_from_a_file_or_a_folder_of_any_width_and_says_what_is_wrong(vgg, tmp_path):
    shape = (1, 32, 32)
    by_folder, by_file = vgg19_bn(shape, str(vgg)), vgg19_bn(shape, str(vgg / "model.safetensors"))
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found, again = (maps.on(torch.device("cpu"))(x)[0] for maps in (by_folder, by_file))
    assert torch.equal(found, again)
    assert found.shape == (4, 303_104 // 32)
    by_imagenet, normalized = (
        vgg19_bn(shape, str(vgg), **{name: value}).on(torch.device("cpu"))(x)[0]
        for name, value in (("batch_statistics", False), ("normalized", True))
    )
    assert not torch.allclose(by_imagenet, found)
    alone = vgg19_bn(shape, str(vgg), batch_statistics=False).on(torch.device("cpu"))(x[:1])[0]
    torch.testing.assert_close(alone, by_imagenet[:1])
    assert not torch.equal(normalized, found)  # by the batch's statistics it nearly cancels, but for the borders
    weights = load_file(vgg / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "num_batches" not in n}, tmp_path / "old.safetensors")
    assert torch.equal(vgg19_bn(shape, str(tmp_path / "old.safetensors")).on(torch.device("cpu"))(x)[0], found)
    save_file({n: t for n, t in weights.items() if "features.49" not in n}, tmp_path / "cut.safetensors")
    with pytest.raises(DataError, match=r"does not hold torchvision's vgg19_bn: its features.* have other names"):
        vgg19_bn(shape, str(tmp_path / "cut.safetensors"))
    with pytest.raises(DataError, match=r"has no model.safetensors .*; give a file, a folder, or a hub id that can"):
        vgg19_bn(shape, str(tmp_path))
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(DataError, match=r"text.safetensors cannot be read as safetensors"):
        vgg19_bn(shape, str(tmp_path / "text.safetensors"))
    with pytest.raises(ValueError, match="give pictures of at least 32×32"):
        vgg19_bn((1, 16, 16), str(vgg))


def test_the_middle_of_a_picture_is_cut_out_before_it_is_resized(tmp_path):
    from PIL import Image

    pytest.importorskip("datasets")
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            picture = np.zeros((10, 8), np.uint8)
            picture[3:7, 2:6] = 200
            for k in range(2):
                Image.fromarray(picture).save(tmp_path / split / label / f"{k}.png")
    assert (hub(str(tmp_path), image_crop=4, image_size=2).train["x"] == 200).all()
    assert hub(str(tmp_path), image_crop=6).input_shape == (1, 6, 6)
    with pytest.raises(ValueError, match="image_crop is 0; it must be > 0"):
        hub(str(tmp_path), image_crop=0)
