"""From prompts to samples: who writes the prompts, what generates, and the cache of what was generated."""

from collections.abc import Callable

from fedray.synthesis.captions import CAPTIONERS, CLIENT_PROMPTS
from fedray.synthesis.diffusion_models import class_conditional, diffusion, sound_diffusion
from fedray.synthesis.generator import Generator
from fedray.synthesis.prompts import PROMPTS
from fedray.synthesis.spoken import espeak, hibari, speech

__all__ = ["CAPTIONERS", "CLIENT_PROMPTS", "GENERATORS", "PROMPTS", "Generator"]

GENERATORS: dict[str, Callable[..., Generator]] = {
    "diffusion": diffusion,
    "class_conditional": class_conditional,
    "sound_diffusion": sound_diffusion,
    "speech": speech,
    "espeak": espeak,
    "hibari": hibari,
}
