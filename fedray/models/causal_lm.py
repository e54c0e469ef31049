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
    config = hugging_face.configuration(path)
    if config.vocab_size < vocabulary:
        raise ValueError(
            f"path is {path!r}, a model of {config.vocab_size} tokens; the data have {vocabulary}: "
            "give the data the model's own tokenizer (task.data.tokenizer=...)"
        )
    made = hugging_face.load(path, AUTO) if weights == "pretrained" else hugging_face.blank(path, AUTO)
    tuned = Tuned(made, method, _logits)
    _check_length(config, length, len(_soft_prompt(tuned.trunk)), path)
    own_what_is_trained(tuned)
    if not any(p.requires_grad for p in tuned.parameters()):
        raise ValueError("method is head, but a language model is not given a new head; choose another method")
    if adapter is not None:
        load_adapter(tuned.trunk, nn.Module(), adapter)
    return tuned


def _logits(network: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (N, L, V) of token ids (N, L)."""
    prompt = _soft_prompt(network)
    if not len(prompt):
        return network(input_ids=tokens, use_cache=False).logits
    embedded = network.get_input_embeddings()(tokens)  # type: ignore[operator]
    prompted = torch.cat([prompt.to(embedded.dtype).expand(len(tokens), -1, -1), embedded], 1)
    return network(inputs_embeds=prompted, use_cache=False).logits[:, len(prompt) :]


def _soft_prompt(network: Any) -> torch.Tensor:
    """The vectors before the text, (count, width); none unless the method is `soft_prompt`."""
    return network.soft_prompt.embedding.weight if hasattr(network, "soft_prompt") else torch.empty(0)


def _check_length(config: Any, length: int, soft: int, path: str) -> None:
    """Whether the model knows as long sequences, with the soft prompt before them."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < length + soft:
        with_prompt = f", and the soft prompt {soft}" if soft else ""
        raise ValueError(
            f"path is {path!r}, a model of sequences up to {longest} tokens; the data have {length}{with_prompt}: "
            "give a smaller task.data.length"
        )
