"""Small reference networks: softmax regression, perceptron, and four convolutional nets."""

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from fedray.models.classifier import Classifier, all_positive, flat_size, image_shape, positive


def softmax(input_shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
    """Softmax (multinomial logistic) regression on the flattened input; convex.

    7,850 parameters on MNIST. Its representation is the flattened input itself.
    """
    return Classifier(nn.Flatten(), flat_size(input_shape), num_classes)


def mlp(
    input_shape: tuple[int, ...],
    num_classes: int,
    /,
    hidden: list[int] = [64],  # noqa: B006 - read only, and the default that `fedray show` prints
) -> nn.Module:
    """Multi-layer perceptron with ReLU on the flattened input; 50,890 parameters on MNIST.

    Args:
        hidden: widths of the hidden layers, first to last; [] is softmax regression.
    """
    widths = [flat_size(input_shape), *all_positive("hidden", hidden)]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (before, after) in enumerate(pairwise(widths), start=1):
        layers[f"dense{i}"] = nn.Linear(before, after)
        layers[f"relu{i}"] = nn.ReLU()
    return Classifier(nn.Sequential(layers), widths[-1], num_classes)


def cnn(
    input_shape: tuple[int, ...],
    num_classes: int,
    /,
    widths: list[int] = [16, 32],  # noqa: B006 - read only
    hidden: int = 128,
) -> nn.Module:
    """Two 3x3 convolutions, max pool, one dense layer; 596,042 parameters on 28x28 grey images.

    The ``simple_cnn`` of pfl-research (Granqvist et al. 2024) without dropout; widths [32, 64] are its full size.

    Args:
        widths: channels of the two convolutions.
        hidden: width of the dense layer.
    """
    channels, height, width = image_shape(input_shape, "cnn", least=6)
    first, second = all_positive("widths", widths, length=2)
    pooled = second * ((height - 4) // 2) * ((width - 4) // 2)  # each unpadded convolution takes 2 pixels
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, first, 3),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(first, second, 3),
        relu2=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        dense=nn.Linear(pooled, positive("hidden", hidden)),
        relu3=nn.ReLU(),
    )
    return Classifier(nn.Sequential(layers), hidden, num_classes)


def lenet(input_shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
    """LeNet-5 with ReLU and max pooling; 61,706 parameters on grey, 62,006 on colour images.

    LeCun et al. 1998, section II.B, whose 28x28 digits lie in a 32x32 field: images with a side below 32 are padded
    by 2 on every side, so that 28x28 and 32x32 images both give 400 pooled values.
    """
    channels, height, width = image_shape(input_shape, "lenet", least=12)
    padding = 2 if min(height, width) < 32 else 0

    def pooled(side: int) -> int:
        return ((side + 2 * padding - 4) // 2 - 4) // 2

    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, 6, 5, padding=padding),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        dense1=nn.Linear(16 * pooled(height) * pooled(width), 120),
        relu3=nn.ReLU(),
        dense2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
    )
    return Classifier(nn.Sequential(layers), 84, num_classes)


def convnet(input_shape: tuple[int, ...], num_classes: int, /, width: int = 128, depth: int = 3) -> nn.Module:
    """ConvNet of dataset condensation: blocks of 3x3 convolution, instance norm, ReLU, average pool.

    Gidaris & Komodakis 2018; Zhao, Mopuri & Bilen 2021; the ConvNet of FGL. 320,010 parameters on
    CIFAR-10, 317,706 on MNIST. Instance norm is affine and keeps no running statistics (group norm with one channel a
    group). As in that literature a 28x28 image is padded by 3 instead of 1 in the first block, which makes it 32x32.

    Args:
        width: channels of every block.
        depth: number of blocks; each halves the image.
    """
    positive("width", width)
    positive("depth", depth)
    channels, *sides = image_shape(input_shape, "convnet", least=2**depth)
    first_padding = 3 if sides == [28, 28] else 1
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, depth + 1):
        before, padding = (channels, first_padding) if i == 1 else (width, 1)
        layers[f"conv{i}"] = nn.Conv2d(before, width, 3, padding=padding)
        layers[f"norm{i}"] = nn.GroupNorm(width, width)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.AvgPool2d(2)
    layers["flatten"] = nn.Flatten()
    rows, columns = ((side + 2 * (first_padding - 1)) // 2**depth for side in sides)
    return Classifier(nn.Sequential(layers), width * rows * columns, num_classes)


def paired_conv(input_shape: tuple[int, ...], num_classes: int, /, depth: int = 4) -> nn.Module:
    """Conv-2, 4 and 6 of the lottery ticket hypothesis, and deeper ones as in FedPM: pairs of convolutions like VGG's.

    Each pair of 3x3 convolutions ends in a 2x2 max pool and has twice the channels of the pair before, from 64; two
    dense layers of 256 follow. 2,425,930 parameters for Conv-4 and 2,262,602 for Conv-6 on CIFAR-10.
    Frankle and Carbin 2019, figure 2; Isik et al. 2023.

    Args:
        depth: number of convolutions; even.
    """
    if depth < 2 or depth % 2:
        raise ValueError(f"depth is {depth}; it must be even, and at least 2")
    before, height, width = image_shape(input_shape, "paired_conv", least=2 ** (depth // 2))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, depth + 1):
        after = 64 * 2 ** ((i - 1) // 2)
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
        layers[f"relu{i}"] = nn.ReLU()
        if i % 2 == 0:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
        before = after
    layers["flatten"] = nn.Flatten()
    for i, (size, hidden) in enumerate(((before * height * width, 256), (256, 256)), start=1):
        layers[f"dense{i}"] = nn.Linear(size, hidden)
        layers[f"relu{depth + i}"] = nn.ReLU()
    return Classifier(nn.Sequential(layers), 256, num_classes)
