"""Everything that a configuration can name, by kind. Imported lazily: a kind's modules load when it is asked for."""

from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any, cast

Registry = Mapping[str, Callable[..., Any]]

KINDS: dict[str, tuple[str, str]] = {  # where the components are, and the type of a parameter that takes one
    "algorithms": ("fedray.algorithms:ALGORITHMS", "fedray.algorithm:FederatedAlgorithm"),
    "aggregators": ("fedray.aggregators:AGGREGATORS", "fedray.aggregators:Aggregator"),
    "privacy": ("fedray.privacy:MECHANISMS", "fedray.privacy:Mechanism"),
    "server_optimizers": ("fedray.server_optimizers:SERVER_OPTIMIZERS", "fedray.server_optimizers:ServerOptimizer"),
    "tasks": ("fedray.tasks:TASKS", "fedray.learner:Task"),
    "datasets": ("fedray.data:DATASETS", "fedray.data:Dataset"),
    "partitions": ("fedray.data:PARTITIONS", "fedray.tasks.classification:Partitioner"),
    "models": ("fedray.models:MODELS", "fedray.tasks.classification:ModelBuilder"),
    "language_models": ("fedray.models:LANGUAGE_MODELS", "fedray.tasks.language:LanguageModelBuilder"),
    "image_generators": (
        "fedray.models.image_generators:IMAGE_GENERATORS",
        "fedray.tasks.generation:ImageGeneratorBuilder",
    ),
    "feature_maps": ("fedray.models.feature_maps:FEATURE_MAPS", "fedray.tasks.generation:FeatureMapsBuilder"),
    "matchings": ("fedray.tasks.matching:MATCHINGS", "fedray.tasks.matching:Matching"),
    "methods": ("fedray.peft:METHODS", "fedray.peft:Method"),
    "averagings": ("fedray.peft.averaging:AVERAGINGS", "fedray.peft.averaging:Averaging"),
    "generators": ("fedray.synthesis:GENERATORS", "fedray.synthesis.generator:Generator"),
    "prompts": ("fedray.synthesis:PROMPTS", "fedray.synthesis.prompts:PromptWriter"),
    "client_prompts": ("fedray.synthesis:CLIENT_PROMPTS", "fedray.synthesis.captions:ClientPrompts"),
    "captioners": ("fedray.synthesis:CAPTIONERS", "fedray.synthesis.captions:Captioner"),
    "extractors": ("fedray.metrics.extractors:EXTRACTORS", "fedray.metrics.extractors:Extractor"),
    "samplers": ("fedray.samplers:SAMPLERS", "fedray.rounds:Sampler"),
    "schedules": ("fedray.schedules:SCHEDULES", "fedray.schedules:Schedule"),
    "devices": ("fedray.devices:DEVICES", "fedray.devices:DevicesBuilder"),
    "backends": ("fedray.backends:BACKENDS", "fedray.backends:Launcher"),
    "trackers": ("fedray.trackers:TRACKERS", "fedray.trackers:TrackerFactory"),
    "schedulers": ("fedray.backends.ray.schedulers:SCHEDULERS", "fedray.backends.ray.schedulers:Scheduler"),
    "searches": ("fedray.backends.ray.schedulers:SEARCHES", "fedray.backends.ray.schedulers:Search"),
}

DEFAULTS = {"backend": "ray", "sampler": "uniform"}  # what stands at the top level where nothing else is named


def components(kind: str) -> Registry:
    """The components of one kind by name."""
    return cast(Registry, resolve_name(KINDS[kind][0]))


def kind_of(annotation: Any) -> str | None:
    """The kind of component that a parameter of this type takes, or None for a plain value."""
    return next((kind for kind, (_, taken) in KINDS.items() if resolve_name(taken) == annotation), None)


def top_level() -> Callable[..., Any]:
    """The function whose signature is the top level of a configuration."""
    from fedray.experiment import experiment

    return experiment
