"""Any causal language model of Hugging Face as a plain module, token ids in, logits out, tuned by any method."""

from typing import Any, Literal

import torch
from torch import nn

from fedray.models import hugging_face
from fedray.models.pretrained import own_what_is_trained
from fedray.peft import Method, Tuned
from fedray.peft.methods import full
from fedray.peft.saving import load_adapter

AUTO = "AutoModelForCausalLM"


def causal_lm(
    vocabulary: int,
    length: int,
    /,
    path: str,
    method: Method = full,
    weights: Literal["pretrained", "random"] = "pretrained",
    adapter: str | None = None,
) -> nn.Module:
    """Any causal language model of Hugging Face, from a local folder or the hub (needs transformers).

    Its parameters are called ``trunk.*``.

    Args:
        path: a local folder with config.json and model.safetensors, or a name on the hub.
        method: Which part of the model is trained and sent.
        weights: those that are there, or random ones of the same architecture, for which config.json is enough.
        adapter: A folder that peft or `fedray export` saved, which training starts from; its kind must be the method's.
    """
    _check(hugging_face.configuration(path), vocabulary, length, path)
    made = hugging_face.load(path, AUTO) if weights == "pretrained" else hugging_face.blank(path, AUTO)
    tuned = Tuned(made, method, _logits)
    own_what_is_trained(tuned)
    if not any(p.requires_grad for p in tuned.parameters()):
        raise ValueError("method is head, but a language model is not given a new head; choose another method")
    if adapter is not None:
        load_adapter(tuned.trunk, nn.Module(), adapter)
    return tuned


def _logits(network: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (N, L, V) of token ids (N, L)."""
    return network(input_ids=tokens, use_cache=False).logits


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
