"""Classifiers by name: reference networks, ``MODELS[name](input_shape, num_classes, **options)``, and pre-trained ones.

``input_shape`` is the shape of one example, (channels, height, width) for the convolutional nets; inputs are float
tensors that the task has normalised. Every model is a ``Classifier``: ``features(x)`` is the representation (N, d)
and ``head`` maps it to logits. Parameters start at PyTorch's defaults, drawn from torch's global generator, which
the caller seeds. A shape or an option that a model cannot have is a ValueError that begins with its name.

The pre-trained ones take the dataset instead, ``MODELS[name](data, **options)``, of whose normalisation and class names
they have to know.

>>> model = MODELS["mlp"]((1, 28, 28), 10, hidden=[64])
>>> sum(p.numel() for p in model.parameters())
50890
"""

from collections.abc import Callable, Mapping

from torch import nn

from fedray.models.audio import audio_conv_rnn
from fedray.models.causal_lm import causal_lm
from fedray.models.classifier import Classifier
from fedray.models.clip import clip
from fedray.models.masked import masked
from fedray.models.nets import cnn, convnet, lenet, mlp, paired_conv, softmax
from fedray.models.pretrained import pretrained
from fedray.models.resnet import resnet18, resnet20
from fedray.models.shufflenet import shufflenet
from fedray.models.transformer import transformer

__all__ = [
    "LANGUAGE_MODELS",
    "MODELS",
    "Classifier",
    "audio_conv_rnn",
    "clip",
    "cnn",
    "convnet",
    "lenet",
    "masked",
    "mlp",
    "paired_conv",
    "pretrained",
    "resnet18",
    "resnet20",
    "shufflenet",
    "softmax",
]

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "softmax": softmax,
    "mlp": mlp,
    "cnn": cnn,
    "lenet": lenet,
    "convnet": convnet,
    "paired_conv": paired_conv,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "shufflenet": shufflenet,
    "audio_conv_rnn": audio_conv_rnn,
    "masked": masked,
    "pretrained": pretrained,
    "clip": clip,
}

LANGUAGE_MODELS: Mapping[str, Callable[..., nn.Module]] = {  # of a vocabulary and a length; see `transformer`
    "transformer": transformer,
    "causal_lm": causal_lm,
}
