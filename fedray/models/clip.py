"""Classification by CLIP (Radford et al., 2021): images against the text of each class, without a trained head."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedray.data.dataset import Dataset
from fedray.errors import DataError
from fedray.models import hugging_face
from fedray.models.pretrained import images_for, own_what_is_trained
from fedray.peft import Method, Tuned
from fedray.peft.methods import full
from fedray.peft.saving import load_adapter


class TextHead(nn.Module):
    """Logits of image embeddings against one text embedding a class: exp(s)·cos(v, t).

    Args:
        texts: Text embeddings, (classes, d).
        log_scale: s, a number.
    """

    def __init__(self, texts: torch.Tensor, log_scale: torch.Tensor) -> None:
        super().__init__()
        self.texts = nn.Parameter(texts.clone(), requires_grad=False)
        self.log_scale = nn.Parameter(log_scale.clone(), requires_grad=False)
        self.encoder: nn.Module | None = None  # with learnt prompts only

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) of image embeddings (N, d)."""
        texts = self.texts if self.encoder is None else self.encoder()
        return self.log_scale.exp() * F.normalize(v, dim=-1) @ F.normalize(texts, dim=-1).T


class TextEncoder(nn.Module):
    """CLIP's text tower on fixed class names behind learnt vectors (CoOp, Zhou et al., 2022).

    Args:
        model: A CLIP model, of which the text side is used and frozen.
        tokens: Token numbers of the classes, each with a start and an end token, (classes, T).
        length: Learnt vectors, shared by all classes, after the start token.
    """

    def __init__(self, model: nn.Module, tokens: torch.Tensor, length: int) -> None:
        super().__init__()
        text_model: Any = model.text_model
        room = text_model.config.max_position_embeddings
        if not 1 <= length <= room - tokens.shape[1]:
            raise ValueError(f"length is {length}; it must be between 1 and {room - tokens.shape[1]}, the room left")
        start = tokens[:, :1]  # stands where the vectors will; any token but the end would do
        self.register_buffer("tokens", torch.cat([start, start.expand(-1, length), tokens[:, 1:]], 1))
        embedding = text_model.embeddings.token_embedding
        context = torch.empty(length, embedding.embedding_dim).normal_(std=0.02)
        text_model.embeddings.token_embedding = Spliced(embedding, context)
        self.text_model, self.projection = text_model, model.get_submodule("text_projection")

    def forward(self) -> torch.Tensor:
        """Text embeddings (classes, d)."""
        return self.projection(self.text_model(input_ids=self.tokens).pooler_output)

    def train(self, mode: bool = True) -> "TextEncoder":
        """The frozen tower stays in evaluation mode, whatever ``mode`` is."""
        return super().train(False)


class Spliced(nn.Module):
    """Token embeddings, in which learnt vectors stand in the places after the first."""

    def __init__(self, embedding: nn.Module, context: torch.Tensor) -> None:
        super().__init__()
        self.embedding, self.context = embedding, nn.Parameter(context)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (classes, T, d) of token numbers (classes, T)."""
        whole, length = self.embedding(tokens), len(self.context)
        return torch.cat([whole[:, :1], self.context.expand(len(whole), -1, -1), whole[:, 1 + length :]], 1)


class ImageText(nn.Module):
    """``head(features(x))``: the image tower and its projection, then the text head."""

    def __init__(self, tower: Tuned, projection: nn.Module, head: TextHead) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(), head
        self.features.add_module("tower", tower)
        self.features.add_module("projection", projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) of images (N, C, H, W)."""
        return self.head(self.features(x))


def clip(
    data: Dataset,
    /,
    path: str,
    method: Method = full,
    template: str = "a photo of a {}",
    image_size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    adapter: str | None = None,
) -> nn.Module:
    """CLIP as a classifier: logits exp(s)·cos of image and text, with the text tower frozen and no trained head.

    A run's evaluation of round 0 is zero-shot classification. The projections and the scale are frozen.

    Args:
        path: A Hugging Face hub id of a CLIP model, or a local folder, which needs no network.
        method: Which part of the image tower is trained and sent; or coop, which learns the text prompts instead.
        template: The text of a class, with {} for its name; coop uses the name alone.
        image_size: Height and width that images are resized to, in pixels; None for the model's own.
        mean: Channel means of the model's training images, in 0..1; None for what the model says.
        std: Channel deviations, likewise.
        adapter: A folder that peft or `fedray export` saved, which training starts from; its kind must be the method's.
    """
    if "{}" not in template:
        raise ValueError(f"template is {template!r}; it must hold {{}}, the place of a class's name")
    model: Any = hugging_face.load(path)
    if model.config.model_type != "clip":
        raise ValueError(f"path names a model of type {model.config.model_type}; it must be clip")
    head = TextHead(_text_embeddings(path, tuple(map(template.format, data.classes))), model.logit_scale)
    own_mean, own_std = hugging_face.own_moments(path, "clip")
    tower = hugging_face.image_tower(model)
    images = images_for(tower, data, image_size, "cls", mean or own_mean, std or own_std)

    def learn_context(length: int) -> None:
        names = _tokens(path, tuple(f"{name}." for name in data.classes))
        head.encoder = TextEncoder(model, names, length)

    tower.__dict__["learn_context"] = learn_context  # for coop
    tuned = Tuned(tower, method, images)
    del tower.__dict__["learn_context"]
    made = ImageText(tuned, model.visual_projection, head)
    own_what_is_trained(made)
    if not any(p.requires_grad for p in made.parameters()):
        raise ValueError("method is head, but CLIP's head is its text, which is not trained; choose another method")
    if adapter is not None:
        load_adapter(tuned.trunk, nn.Module(), adapter)
    return made


@lru_cache
def _tokens(path: str, texts: tuple[str, ...]) -> torch.Tensor:
    """Token numbers (texts, T), padded at the end."""
    missing = (
        f"{path} has no tokenizer, which CLIP's prompts need; put tokenizer.json, or vocab.json and merges.txt, there"
    )
    try:
        tokenizer = hugging_face.transformers().AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{missing} ({' '.join(str(error).split())})") from error
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")["input_ids"]
    if int(tokens.max()) >= len(tokenizer):  # transformers makes an empty one where the files are missing
        raise DataError(missing)
    return tokens


@lru_cache(maxsize=4)
def _text_embeddings(path: str, texts: tuple[str, ...]) -> torch.Tensor:
    """The text tower's embeddings of the texts, (texts, d); computed once a process."""
    model: Any = hugging_face.load(path)
    with torch.random.fork_rng(), torch.no_grad():
        return model.get_text_features(input_ids=_tokens(path, texts)).pooler_output
