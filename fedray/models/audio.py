"""Classifiers of sounds."""

import math

import torch
from torch import nn

from fedray.models.classifier import Classifier, positive


class LogMel(nn.Module):
    """Sounds (N, T) to log-mel spectrograms (N, n_mels, frames), each row of each with mean 0 and deviation 1.

    Triangular filters on the mel scale 2595·log10(1 + f/700), Hann windows.

    Args:
        sample_rate: In hertz.
        n_mels: Filters.
        n_fft: Samples of a window.
        hop: Samples from one window to the next.
    """

    def __init__(self, sample_rate: int, n_mels: int, n_fft: int, hop: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.window = nn.Buffer(torch.hann_window(n_fft), persistent=False)
        self.filters = nn.Buffer(_filters(sample_rate, n_mels, n_fft), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Spectrograms of sounds."""
        spectrum = torch.stft(x, self.n_fft, self.hop, window=self.window, return_complex=True).abs().square()
        rows = (self.filters @ spectrum + 1e-6).log()
        return (rows - rows.mean(2, keepdim=True)) / (rows.std(2, keepdim=True) + 1e-5)


def _filters(sample_rate: int, n_mels: int, n_fft: int) -> torch.Tensor:
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, n_mels + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0).float()


class _Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x.transpose(1, 2))[0].mean(1)


def audio_conv_rnn(
    input_shape: tuple[int, ...],
    num_classes: int,
    /,
    sample_rate: int = 16000,
    n_mels: int = 128,
    n_fft: int = 1024,
    hop: int = 160,
    dropout: float = 0.1,
) -> nn.Module:
    """FedAudio's network (Zhang et al., 2023), which GPT-FL uses: log-mel, two convolutions, a bidirectional GRU.

    286,834 parameters for 50 classes. Sounds are arrays of samples, (T,).

    Args:
        input_shape: (T,).
        num_classes: Classes.
        sample_rate: Of the sounds, in hertz.
        n_mels: Rows of the spectrogram.
        n_fft: Samples of a window of the spectrogram.
        hop: Samples from one window to the next.
        dropout: Probability.
    """
    if len(input_shape) != 1 or input_shape[0] < 4 * hop or input_shape[0] <= n_fft // 2:
        least = max(4 * hop, n_fft // 2 + 1)
        raise ValueError(f"input_shape is {input_shape}; audio_conv_rnn takes sounds of shape (samples,), >= {least}")
    for name, value in (("sample_rate", sample_rate), ("n_mels", n_mels), ("n_fft", n_fft), ("hop", hop)):
        positive(name, value)
    features = nn.Sequential(
        LogMel(sample_rate, n_mels, n_fft, hop),
        nn.Conv1d(n_mels, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Dropout(dropout),
        _Recurrent(128),
        nn.Linear(256, 128),
        nn.ReLU(),
    )
    return Classifier(features, 128, num_classes)
