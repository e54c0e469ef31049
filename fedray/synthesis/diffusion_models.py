"""Generators of diffusers: text to image, class to image, text to sound; from the hub or a local folder."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fedray.errors import ConfigError, DataError
from fedray.synthesis.fingerprints import fingerprint
from fedray.synthesis.generator import Generate, Generator, png, wav
from fedray.synthesis.requests import Request
from fedray.synthesis.store import Sample

Precision = Literal["float32", "float16", "bfloat16"]

SHIPPED = Path(__file__).parent / "pipelines"


def diffusion(
    path: str,
    steps: int = 50,
    guidance: float | None = None,
    size: int | None = None,
    scheduler: str | None = None,
    precision: Precision = "float32",
    safety_checker: bool = False,
    batch_size: int = 16,
) -> Generator:
    """Any text-to-image pipeline of diffusers: Stable Diffusion, and what is called as it is.

    Args:
        path: A hub id, a local folder, or ``shipped:fashion_mnist`` and ``shipped:cifar10``.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance, where a request has none; None for the pipeline's own.
        size: Height and width in pixels; None for the pipeline's own.
        scheduler: Class of a scheduler of diffusers, instead of the pipeline's own.
        precision: Of the weights and the arithmetic.
        safety_checker: Withhold pictures that the pipeline's own checker, if it has one, takes for unsafe.
        batch_size: Pictures of a call.
    """
    return _pipeline(
        path,
        {"steps": steps, "guidance": guidance, "size": size, "scheduler": scheduler, "precision": precision},
        batch_size,
        safety_checker,
        lambda batch: {
            "prompt": [request.prompt for request in batch],
            "negative_prompt": [request.negative for request in batch],
        },
    )


def class_conditional(
    path: str,
    classes: list[int] | None = None,
    steps: int = 50,
    guidance: float | None = None,
    scheduler: str | None = None,
    precision: Precision = "float32",
    batch_size: int = 16,
) -> Generator:
    """A class-conditional pipeline of diffusers (DiT); prompts are not read, only whose class they are.

    Args:
        path: A hub id, or a local folder.
        classes: The pipeline's numbers of our classes, in their order; None if they are the same.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance, where a request has none; None for the pipeline's own.
        scheduler: Class of a scheduler of diffusers, instead of the pipeline's own.
        precision: Of the weights and the arithmetic.
        batch_size: Pictures of a call.
    """
    settings = {"steps": steps, "guidance": guidance, "scheduler": scheduler, "precision": precision}
    return _pipeline(
        path,
        {**settings, "sees": "label", "classes": classes},
        batch_size,
        False,
        lambda batch: {"class_labels": [classes[r.label] if classes else r.label for r in batch]},
    )


def sound_diffusion(
    path: str,
    seconds: float = 5.0,
    steps: int = 100,
    guidance: float | None = None,
    precision: Precision = "float32",
    batch_size: int = 4,
) -> Generator:
    """A text-to-audio pipeline of diffusers: AudioLDM, and what is called as it is.

    Args:
        path: A hub id, or a local folder.
        seconds: Length of a sound.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance, where a request has none; None for the pipeline's own.
        precision: Of the weights and the arithmetic.
        batch_size: Sounds of a call.
    """
    return _pipeline(
        path,
        {"steps": steps, "guidance": guidance, "precision": precision, "seconds": seconds},
        batch_size,
        False,
        lambda batch: {
            "prompt": [request.prompt for request in batch],
            "negative_prompt": [request.negative for request in batch],
            "audio_length_in_s": seconds,
        },
        media="audio",
    )


def _pipeline(
    path: str,
    options: dict[str, Any],
    batch_size: int,
    safety_checker: bool,
    asked: Callable[[Sequence[Request]], dict[str, Any]],
    media: Literal["image", "audio"] = "image",
) -> Generator:
    if options["steps"] < 1:
        raise ValueError(f"steps is {options['steps']}; it must be >= 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be >= 1")
    folder = local_folder(path)
    settings = {**options, "weights": fingerprint(str(folder)), "batch": batch_size, "safety_checker": safety_checker}

    def load(device: str) -> Generate:
        pipeline = _loaded(str(folder), options, safety_checker).to(device)
        return _bounded(lambda batch: _run(pipeline, batch, options, asked))

    return Generator(settings, load, batch_size, media)


def local_folder(path: str) -> Path:
    """The folder of a diffusers pipeline: shipped, local, or fetched from the hub.

    Raises:
        DataError: there is no pipeline.
    """
    shipped = path.removeprefix("shipped:")
    folder = SHIPPED / shipped if shipped != path else Path(path).expanduser()
    if shipped != path and not folder.is_dir():
        there = ", ".join(f"shipped:{one.name}" for one in sorted(SHIPPED.iterdir()))
        raise DataError(f"{path} is not shipped with fedray; there are {there}")
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "~", "/")):
        try:
            return Path(_diffusers().DiffusionPipeline.download(path))
        except Exception as error:  # whatever the hub's client raises
            raise DataError(
                f"{path} is no local folder, and the hub has no such pipeline or is unreachable or offline "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
    if not (folder / "model_index.json").is_file():
        problem = "has no model_index.json" if folder.is_dir() else "does not exist"
        raise DataError(f"{path} {problem}; give a hub id, or a folder that a diffusers pipeline was saved to")
    return folder


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise ConfigError("this generator needs the package 'diffusers': pip install 'fedray[synthesis]'") from None
    return diffusers


def _loaded(folder: str, options: dict[str, Any], safety_checker: bool) -> Any:
    library = _diffusers()
    import torch
    import transformers

    for each in (library, transformers):  # whose bars every actor would draw
        each.utils.logging.set_verbosity_error()
        each.utils.logging.disable_progress_bar()
    try:
        takes = library.DiffusionPipeline.load_config(folder)
        extra = {"safety_checker": None} if "safety_checker" in takes and not safety_checker else {}
        pipeline = library.DiffusionPipeline.from_pretrained(
            folder, dtype=getattr(torch, options["precision"]), local_files_only=True, **extra
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} cannot be loaded as a diffusers pipeline: {' '.join(str(error).split())}") from error
    if options.get("scheduler"):
        kind = getattr(library, options["scheduler"], None)
        if kind is None:
            raise ConfigError(f"scheduler is {options['scheduler']!r}; diffusers has no such class")
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _bounded(generate: Generate) -> Generate:
    """Halve a batch for which the device has no memory, and go on."""

    def bounded(batch: Sequence[Request]) -> list[Sample]:
        import torch

        try:
            return generate(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        return bounded(batch[:middle]) + bounded(batch[middle:])

    return bounded


def _run(
    pipeline: Any,
    batch: Sequence[Request],
    options: dict[str, Any],
    asked: Callable[[Sequence[Request]], dict[str, Any]],
) -> list[Sample]:
    """A call for each scale of guidance among the requests; each sample has noise from a seed of its own."""
    import torch

    takes = inspect.signature(pipeline.__call__).parameters
    samples: list[Sample] = [None] * len(batch)
    for scale in sorted({request.guidance for request in batch}, key=lambda value: (value is not None, value)):
        places = [place for place, request in enumerate(batch) if request.guidance == scale]
        chosen = [batch[place] for place in places]
        guidance = options["guidance"] if scale is None else scale
        wanted = {
            **asked(chosen),
            "num_inference_steps": options["steps"],
            "generator": [torch.Generator().manual_seed(request.seed) for request in chosen],
            "output_type": "np",
            **({} if guidance is None else {"guidance_scale": guidance}),
            **({} if options.get("size") is None else {"height": options["size"], "width": options["size"]}),
        }
        if not any(wanted.get("negative_prompt", [])):
            wanted.pop("negative_prompt", None)
        with torch.no_grad():
            out = pipeline(**{name: value for name, value in wanted.items() if name in takes})
        if hasattr(out, "audios"):
            encoded = [wav(sound, pipeline.vocoder.config.sampling_rate) for sound in out.audios]
        else:
            encoded = [png(image) for image in out.images]
        unsafe = getattr(out, "nsfw_content_detected", None) or [False] * len(chosen)
        for place, sample, withheld in zip(places, encoded, unsafe, strict=True):
            samples[place] = None if withheld else sample
    return samples
