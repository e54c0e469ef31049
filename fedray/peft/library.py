"""Methods that the library peft builds: LoRA, IA3 and soft prompts. It is loaded when one of them is used."""

from typing import Any, Literal

from torch import nn

from fedray.errors import ConfigError
from fedray.peft.methods import linear_names
from fedray.peft.parts import freeze, train_only

ADAPTER_NAME = "default"  # as peft calls the adapter that it loads from a folder

_ATTENTION = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("c_attn",),
    ("qkv",),
    ("query_key_value",),
)
_IA3 = (
    ("k_proj", "v_proj", "fc2"),
    ("k_proj", "v_proj", "down_proj"),
    ("key", "value", "fc2"),
    ("c_attn", "mlp.c_proj"),
)


def lora(
    trunk: nn.Module,
    /,
    rank: int = 8,
    alpha: float | None = None,
    targets: list[str] | None = None,
    dropout: float = 0.0,
    rank_stabilised: bool = False,
    factors: Literal["AB", "B"] = "AB",
) -> nn.Module:
    """Low-rank updates of linear layers, W + s·B·A (LoRA, Hu et al., 2022).

    A is random and B zero at the start; the names of what is sent hold ``.lora_A.`` and ``.lora_B.``.

    Args:
        rank: Rank r of an update.
        alpha: The scale s is alpha/r; None for twice the rank, so that s is 2.
        targets: The last part of the names of the layers; None for the attention's queries and values.
        dropout: Applied to the input of A in training.
        rank_stabilised: The scale is alpha/sqrt(r) (rsLoRA, Kalajdzievski, 2023).
        factors: Both are trained, or B alone while A stays as it was drawn (FFA-LoRA, Sun et al., 2024): what an
            algorithm does to what is sent (mean, noise, a server's step) it then does to B·A.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be >= 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
    freeze(trunk)
    names = linear_names(trunk, targets, _ATTENTION)
    peft = library()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=names,
        lora_dropout=dropout,
        use_rslora=rank_stabilised,
    )
    return _injected(trunk, config, "lora_" if factors == "AB" else "lora_B.")


def ia3(trunk: nn.Module, /, targets: list[str] | None = None, feedforward: list[str] | None = None) -> nn.Module:
    """Learnt factors of keys, values and the MLP's inner activations (IA3, Liu et al., 2022).

    Args:
        targets: The last part of the names of the layers; None for keys, values and the MLP's last layer.
        feedforward: Those of them whose input is scaled, instead of their output; None for the MLP's last layer.
    """
    freeze(trunk)
    names = linear_names(trunk, targets, _IA3)
    inner = tuple(feedforward) if feedforward is not None else ("fc2", "down_proj", "c_proj")
    config = library().IA3Config(
        target_modules=names, feedforward_modules=[name for name in names if name.endswith(inner)]
    )
    return _injected(trunk, config, "ia3_")


def soft_prompt(
    trunk: nn.Module, /, length: int = 20, start: Literal["vocabulary", "random"] = "vocabulary"
) -> nn.Module:
    """Learnt vectors before the tokens of a language model's text (prompt tuning, Lester et al., 2021).

    They are called ``soft_prompt.embedding.weight``, shape (length, width), and take the places of as many tokens.

    Args:
        length: How many vectors.
        start: The embeddings of tokens drawn from the vocabulary, or standard normal numbers.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it must be >= 1")
    find: Any = getattr(trunk, "get_input_embeddings", lambda: None)
    words = find()
    if not isinstance(words, nn.Embedding):
        raise ValueError(f"{type(trunk).__name__} does not embed tokens; soft prompts are for language models")
    peft, shape = library(), getattr(trunk, "config", None)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        prompt_tuning_init="SAMPLE_VOCAB" if start == "vocabulary" else "RANDOM",
        token_dim=words.embedding_dim,
        num_transformer_submodules=1,
        num_attention_heads=getattr(shape, "num_attention_heads", None),
        num_layers=getattr(shape, "num_hidden_layers", None),
    )
    freeze(trunk).add_module("soft_prompt", peft.PromptEmbedding(config, words))
    trunk.peft_config = {ADAPTER_NAME: config}  # type: ignore[assignment]
    return trunk


def library() -> Any:
    """The library peft, or a message that says how to install it."""
    try:
        import peft
    except ImportError:
        raise ConfigError("lora, ia3 and soft_prompt need the package 'peft': pip install 'fedray[peft]'") from None
    return peft


def _injected(trunk: nn.Module, config: Any, mark: str) -> nn.Module:
    made = library().inject_adapter_in_model(config, trunk, adapter_name=ADAPTER_NAME)
    return train_only(made, lambda name: f".{mark}" in f".{name}", "layers to adapt")
