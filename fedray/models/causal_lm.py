"""Any causal language model of Hugging Face as a plain module: token ids in, logits out."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn


class Logits(nn.Module):
    """A network of `transformers` whose output is its logits alone; its parameters are named ``network.*``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (N, L, V) of token ids (N, L)."""
        return self.network(input_ids=tokens, use_cache=False).logits


def causal_lm(
    vocabulary: int,
    length: int,
    /,
    path: str,
    weights: Literal["pretrained", "random"] = "pretrained",
) -> nn.Module:
    """Any causal language model of Hugging Face, from a local folder or the hub (needs transformers).

    Args:
        path: a local folder with config.json and model.safetensors, or a name on the hub.
        weights: those that are there, or random ones of the same architecture, for which config.json is enough.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("causal_lm needs the package 'transformers': pip install 'fedray[language]'") from None
    local = Path(path).expanduser().exists()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=local)
        _check(config, vocabulary, length, path)
        auto: Any = transformers.AutoModelForCausalLM
        if weights == "random":
            network, missing = auto.from_config(config), []
        else:
            network, loaded = auto.from_pretrained(path, local_files_only=local, output_loading_info=True)
            missing = sorted(loaded["missing_keys"])
    except (OSError, KeyError, ImportError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"path is {path!r}, from which no causal language model can be loaded ({words})") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    if missing:
        raise ValueError(
            f"path is {path!r}, whose weights lack {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            + ": they are of another kind of model, or incomplete; weights=random starts from nothing"
        )
    return Logits(network.float())


def _check(config: Any, vocabulary: int, length: int, path: str) -> None:
    """Whether the model knows all tokens, and as long sequences."""
    if config.vocab_size < vocabulary:
        raise ValueError(
            f"path is {path!r}, a model of {config.vocab_size} tokens; the data have {vocabulary}: "
            "give the data the model's own tokenizer (task.data.tokenizer=...)"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < length:
        raise ValueError(
            f"path is {path!r}, a model of sequences up to {longest} tokens; the data have {length}: "
            "give a smaller task.data.length"
        )
