"""Reference models: published sizes, the features/head contract, and messages for what cannot be built."""

import inspect
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedray import models
from fedray.errors import DataError
from fedray.models import Classifier

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
MODELS = {
    name: made for name, made in models.MODELS.items() if name not in ("pretrained", "clip", "masked", "audio_conv_rnn")
}  # these have tests/test_pretrained.py, tests/test_clip.py, tests/test_prism.py and tests/test_audio.py


def count(name: str, input_shape: tuple[int, ...], num_classes: int = 10, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MODELS[name](input_shape, num_classes, **options).parameters())


@pytest.mark.parametrize(
    ("size", "name", "input_shape", "num_classes", "options"),
    [
        (7_850, "softmax", GREY, 10, {}),
        (50_890, "mlp", GREY, 10, {}),
        (784 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10, "mlp", GREY, 10, {"hidden": [200, 200]}),
        (596_042, "cnn", GREY, 10, {}),
        (1_199_882, "cnn", GREY, 10, {"widths": [32, 64]}),  # pfl's simple_cnn
        (61_706, "lenet", GREY, 10, {}),
        (61_706, "lenet", (1, 32, 32), 10, {}),
        (62_006, "lenet", COLOUR, 10, {}),
        (320_010, "convnet", COLOUR, 10, {}),  # published, as the next; the other two by hand from the same layers
        (504_420, "convnet", COLOUR, 100, {}),
        (317_706, "convnet", GREY, 10, {}),  # 1,280 + 2 x 147,584 + 3 x 256 + 20,490
        (10_535_526, "convnet", (3, 224, 224), 102, {}),
        (4_301_642, "paired_conv", COLOUR, 10, {"depth": 2}),  # published as 4.3 and 2.4 million
        (2_425_930, "paired_conv", COLOUR, 10, {}),
        (2_262_602, "paired_conv", COLOUR, 10, {"depth": 6}),  # 1,145,408 in convolutions, the rest in dense layers
        (11_173_962, "resnet18", COLOUR, 10, {"norm": "batch"}),
        (11_173_962, "resnet18", COLOUR, 10, {}),
        (11_689_512, "resnet18", (3, 224, 224), 1000, {"norm": "batch", "stem": "7x7"}),  # torchvision's
        (269_722, "resnet20", COLOUR, 10, {"norm": "batch"}),  # option A; projections would make it 272,474
        (269_722, "resnet20", COLOUR, 10, {}),
        (444_292, "shufflenet", COLOUR, 100, {}),  # FedPEFT's communication table
        (1_366_792, "shufflenet", COLOUR, 1000, {"norm": "batch"}),  # torchvision's
    ],
)
def test_parameter_counts_are_those_published_or_counted_by_hand(size, name, input_shape, num_classes, options):
    assert count(name, input_shape, num_classes, **options) == size


@pytest.mark.parametrize("input_shape", [GREY, COLOUR, (2, 12, 17)])
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_head_of_features(name: str, input_shape: tuple[int, ...]):
    torch.manual_seed(0)
    model = MODELS[name](input_shape, 7)
    x = torch.randn(3, *input_shape)
    assert isinstance(model, Classifier)
    z = model.features(x)
    assert z.shape == (3, model.head.in_features)
    assert model(x).shape == (3, 7)
    assert torch.equal(model(x), model.head(z))
    assert {key.partition(".")[0] for key, _ in model.named_parameters()} <= {"features", "head"}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str):
    torch.manual_seed(0)
    model = MODELS[name](GREY, 10)
    nn.functional.cross_entropy(model(torch.randn(4, *GREY)), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_global_seed_decides_the_start(name: str):
    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(MODELS[name](GREY, 10).parameters())

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


@pytest.mark.parametrize("name", MODELS)
def test_by_default_there_are_no_buffers(name: str):
    assert not list(MODELS[name](GREY, 10).buffers())


def test_batch_norm_has_buffers():
    for name in ("resnet18", "resnet20", "shufflenet"):
        assert any("running_mean" in key for key, _ in MODELS[name](GREY, 10, norm="batch").named_buffers())


def test_the_cnn_is_pfls_at_half_width():
    torch.manual_seed(0)
    ours = MODELS["cnn"](GREY, 10)
    torch.manual_seed(0)
    theirs = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(4608, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    x = torch.randn(2, *GREY)
    assert torch.equal(ours(x), theirs(x))


def test_an_mlp_without_hidden_layers_is_softmax_regression():
    torch.manual_seed(0)
    mlp = MODELS["mlp"](GREY, 10, hidden=[])
    torch.manual_seed(0)
    softmax = MODELS["softmax"](GREY, 10)
    x = torch.randn(2, *GREY)
    assert torch.equal(mlp(x), softmax(x))


def test_convnet_normalises_every_channel_of_every_image_by_itself():
    torch.manual_seed(0)
    model = MODELS["convnet"](COLOUR, 10)
    x = torch.randn(2, *COLOUR)
    h = model.features.norm1(model.features.conv1(x))
    torch.testing.assert_close(h, nn.functional.instance_norm(model.features.conv1(x)))
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@pytest.mark.parametrize(
    ("name", "groups"),
    [*product(["resnet18", "resnet20"], [1, 2, 4, 16]), *product(["shufflenet"], [1, 2, 4, 8])],
)
def test_groups_are_those_of_every_group_norm(name: str, groups: int):
    norms = [m for m in MODELS[name](COLOUR, 10, groups=groups).modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == {"resnet18": 20, "resnet20": 19, "shufflenet": 56}[name]
    assert {m.num_groups for m in norms} == {groups}


def test_resnet20_shortcuts_have_no_parameters_and_pad_with_zeros():
    model = MODELS["resnet20"](COLOUR, 10)
    shortcut = model.features.stage2[0].shortcut
    x = torch.randn(2, 16, 8, 8)
    out = shortcut(x)
    assert not list(shortcut.parameters())
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2])
    assert out.shape == (2, 32, 4, 4)
    assert not out[:, 16:].any()


@pytest.mark.parametrize("name", MODELS)
def test_clients_can_be_trained_in_one_call(name: str):
    """Stacked parameters under vmap give each client's own gradient: no op acts in place or across examples."""
    torch.manual_seed(0)
    small = (1, 12, 12)
    model = MODELS[name](small, 10).double()
    clients = 2
    stacked = {k: torch.stack([p + 0.01 * i for i in range(clients)]).detach() for k, p in model.named_parameters()}
    x, y = torch.randn(clients, 2, *small, dtype=torch.float64), torch.randint(10, (clients, 2))

    def loss(params, x, y):
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    together = torch.func.vmap(torch.func.grad(loss))(stacked, x, y)
    for i in range(clients):
        alone = torch.func.grad(loss)({k: p[i] for k, p in stacked.items()}, x[i], y[i])
        torch.testing.assert_close({k: g[i] for k, g in together.items()}, alone)


@pytest.mark.parametrize("name", ["softmax", "mlp"])
def test_dense_models_take_any_shape(name: str):
    for input_shape in [(5,), (8, 3), (2, 3, 4, 5)]:
        assert MODELS[name](input_shape, 2)(torch.randn(3, *input_shape)).shape == (3, 2)


SMALLEST = {"cnn": 6, "lenet": 12, "convnet": 8, "paired_conv": 4, "resnet18": 8, "resnet20": 4}


@pytest.mark.parametrize(("name", "side"), SMALLEST.items())
def test_the_smallest_image_works_and_a_smaller_one_says_so(name: str, side: int):
    assert MODELS[name]((1, side, side), 10)(torch.randn(2, 1, side, side)).shape == (2, 10)
    for shape in [(1, side - 1, side), (1, side, side - 1)]:
        with pytest.raises(ValueError, match=rf"^input_shape is \({shape[0]}, .*at least {side} x {side} pixels"):
            MODELS[name](shape, 10)


def test_a_7x7_stem_needs_a_larger_image():
    assert MODELS["resnet18"]((3, 32, 32), 10, stem="7x7")(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"resnet18 with a 7x7 stem needs images of at least 32 x 32 pixels"):
        MODELS["resnet18"]((3, 28, 28), 10, stem="7x7")


@pytest.mark.parametrize("name", SMALLEST)
def test_convolutions_refuse_what_is_not_an_image(name: str):
    for shape in [(16000,), (40, 101), (1, 3, 32, 32)]:
        with pytest.raises(ValueError, match=r"^input_shape is .*takes images of shape \(channels, height, width\)"):
            MODELS[name](shape, 10)


@pytest.mark.parametrize("name", MODELS)
def test_empty_inputs_and_no_classes_are_refused(name: str):
    with pytest.raises(ValueError, match=r"^input_shape is \(0, 28, 28\); every example must have at least one value"):
        MODELS[name]((0, 28, 28), 10)
    with pytest.raises(ValueError, match=r"^num_classes is 0; it must be >= 1"):
        MODELS[name](GREY, 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"hidden": [64, 0]}, r"^hidden is \[64, 0\]; every entry must be >= 1"),
        ("cnn", {"widths": [16]}, r"^widths is \[16\]; it must have 2 entries"),
        ("cnn", {"widths": [16, -1]}, r"^widths is \[16, -1\]; every entry must be >= 1"),
        ("cnn", {"hidden": 0}, "^hidden is 0; it must be >= 1"),
        ("convnet", {"width": 0}, "^width is 0; it must be >= 1"),
        ("convnet", {"depth": 0}, "^depth is 0; it must be >= 1"),
        ("convnet", {"depth": 5}, r"convnet needs images of at least 32 x 32 pixels"),
        ("paired_conv", {"depth": 3}, "^depth is 3; it must be even, and at least 2"),
        ("paired_conv", {"depth": 10}, r"paired_conv needs images of at least 32 x 32 pixels"),
        ("resnet18", {"groups": 3}, "^groups is 3; it must divide 64"),
        ("resnet20", {"groups": 32}, "^groups is 32; it must divide 16"),
        ("resnet20", {"groups": 0}, "^groups is 0; it must be >= 1"),
        ("resnet20", {"norm": "layer"}, "^norm is 'layer'; it must be 'group' or 'batch'"),
        ("shufflenet", {"groups": 3}, "^groups is 3; it must divide 8"),
        ("shufflenet", {"image_size": 0}, "^image_size is 0; it must be >= 1"),
        (
            "shufflenet",
            {"image_size": 32, "weights": "x.safetensors"},
            "^norm is 'group', but weights are those of batch",
        ),
        ("resnet18", {"stem": "5x5"}, "^stem is '5x5'; it must be '3x3' or '7x7'"),
    ],
)
def test_impossible_options_are_named(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MODELS[name](GREY, 10, **options)


@pytest.mark.parametrize("name", MODELS)
def test_every_option_is_documented(name: str):
    options = [p.name for p in inspect.signature(MODELS[name]).parameters.values() if p.kind is not p.POSITIONAL_ONLY]
    doc = inspect.getdoc(MODELS[name])
    assert all(f"    {option}: " in doc for option in options)


def test_shufflenet_takes_torchvisions_weights_and_no_others(tmp_path):
    torch.manual_seed(0)
    whole = MODELS["shufflenet"](COLOUR, 10, norm="batch").eval()
    with torch.no_grad():
        for tensor in whole.state_dict().values():  # statistics too
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.5)
    named = {
        name.removeprefix("features."): t for name, t in whole.state_dict().items() if name.startswith("features.")
    }
    assert {
        "conv1.0.weight",
        "stage2.0.branch1.2.weight",
        "stage4.3.branch2.6.running_var",
        "conv5.1.bias",
    } < named.keys()
    file = tmp_path / "shufflenet.safetensors"
    save_file({**named, "fc.weight": torch.zeros(1000, 1024)}, file)
    mine = MODELS["shufflenet"](COLOUR, 5, norm="batch", weights=str(file)).eval()
    x = torch.randn(2, *COLOUR)
    assert torch.equal(mine.features(x), whole.features(x))
    larger = MODELS["shufflenet"](COLOUR, 5, norm="batch", weights=str(file), image_size=64).eval()
    assert not torch.allclose(larger.features(x), whole.features(x))
    with pytest.raises(
        DataError, match=r"does not hold torchvision's shufflenet_v2_x0_5 of 1 channels: its conv1.0.weight"
    ):
        MODELS["shufflenet"](GREY, 5, norm="batch", weights=str(file))
    del named["stage3.7.branch2.0.weight"]
    save_file(named, file)
    with pytest.raises(DataError, match=r"stage3.7.branch2.0.weight have other names or shapes"):
        MODELS["shufflenet"](COLOUR, 5, norm="batch", weights=str(file))
    file.write_bytes(b"no safetensors")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        MODELS["shufflenet"](COLOUR, 5, norm="batch", weights=str(file))
    with pytest.raises(DataError, match=r"nowhere.safetensors cannot be read as safetensors"):
        MODELS["shufflenet"](COLOUR, 5, norm="batch", weights="nowhere.safetensors")
