"""Generators of speech: SpeechT5, hibari-tts, and the program espeak-ng."""

import hashlib
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np

from fedray.errors import ConfigError, DataError
from fedray.synthesis.fingerprints import fingerprint
from fedray.synthesis.generator import Generate, Generator, wav
from fedray.synthesis.requests import Request
from fedray.synthesis.store import Sample


def speech(
    path: str,
    vocoder: str,
    speakers: str,
    many_speakers: bool = True,
    batch_size: int = 16,
) -> Generator:
    """Spoken prompts by SpeechT5 (Ao et al., 2022), as in GPT-FL's speech commands.

    Args:
        path: A SpeechT5 text-to-speech model: hub id or local folder.
        vocoder: A HiFi-GAN for it: hub id or local folder.
        speakers: A numpy file of speaker embeddings, shape (n, 512).
        many_speakers: A speaker drawn for each sample; otherwise the first for all.
        batch_size: Samples that are kept in one file.
    """
    try:
        embeddings = np.load(Path(speakers).expanduser(), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{speakers} cannot be read as a numpy array of speaker embeddings ({error})") from error
    identity = {"speech": path, "vocoder": vocoder, "many_speakers": many_speakers, "batch": batch_size}
    identity |= {
        name: fingerprint(place) for name, place in (("weights", path), ("voice", vocoder)) if Path(place).is_dir()
    }
    identity["speakers"] = hashlib.sha256(np.ascontiguousarray(embeddings).tobytes()).hexdigest()

    def load(device: str) -> Generate:
        import torch
        import transformers

        try:
            processor: Any = transformers.SpeechT5Processor.from_pretrained(path)
            model: Any = transformers.SpeechT5ForTextToSpeech.from_pretrained(path)
            hifigan: Any = transformers.SpeechT5HifiGan.from_pretrained(vocoder)
            model, hifigan = model.to(device).eval(), hifigan.to(device).eval()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be loaded as SpeechT5: {' '.join(str(error).split())}") from error

        def say(request: Request) -> Sample:
            who = request.seed % len(embeddings) if many_speakers else 0
            voice = torch.from_numpy(embeddings[who : who + 1]).float().to(device)
            torch.manual_seed(request.seed)  # the decoder's prenet drops out even when it is used
            given = processor(text=request.prompt, return_tensors="pt").to(device)
            with torch.no_grad():
                sound = model.generate_speech(given["input_ids"], voice, vocoder=hifigan)
            return wav(sound.cpu().numpy(), hifigan.config.sampling_rate)

        return lambda batch: [say(request) for request in batch]

    return Generator(identity, load, batch_size, "audio")


def espeak(voices: list[str] | None = None, slowest: int = 120, fastest: int = 220, batch_size: int = 32) -> Generator:
    """Spoken prompts by the program espeak-ng, each with a voice, a speed and a pitch drawn at random.

    Args:
        voices: Voices of espeak-ng, such as en-us+f3; None for thirteen English ones.
        slowest: Words a minute.
        fastest: Words a minute.
        batch_size: Samples that are kept in one file.
    """
    if not 80 <= slowest <= fastest <= 450:
        raise ValueError(f"slowest is {slowest} and fastest {fastest}; they must be ordered, between 80 and 450")
    program = which("espeak-ng")
    if program is None:
        raise ConfigError("espeak needs the program espeak-ng: apt-get install espeak-ng")
    chosen = voices or [*(f"en-us+m{i}" for i in range(1, 8)), *(f"en-us+f{i}" for i in range(1, 6)), "en-gb"]
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()[3]
    settings = {"espeak": version, "voices": chosen, "slowest": slowest, "fastest": fastest, "batch": batch_size}

    def say(request: Request) -> Sample:
        draw = np.random.default_rng(request.seed)
        voice, speed = chosen[draw.integers(len(chosen))], draw.integers(slowest, fastest + 1)
        pitch = str(draw.integers(20, 81))
        command = [program, "-v", voice, "-s", str(speed), "-p", pitch, "--stdout", request.prompt]
        said = subprocess.run(command, capture_output=True, check=False)
        if said.returncode or not said.stdout:
            raise DataError(f"espeak-ng cannot say {request.prompt!r} as {voice}: {said.stderr.decode().strip()}")
        return said.stdout

    return Generator(settings, lambda _: lambda batch: [say(request) for request in batch], batch_size, "audio")


def hibari(voice: str = "heart", slowest: float = 0.8, fastest: float = 1.25, batch_size: int = 32) -> Generator:
    """Spoken prompts by hibari-tts, a small neural voice, each at a speed drawn at random.

    Args:
        voice: A voice of hibari; heart comes with the package, others are fetched once.
        slowest: Speed, 1 being the voice's own.
        fastest: Speed.
        batch_size: Samples that are kept in one file.
    """
    if not 0.5 <= slowest <= fastest <= 2:
        raise ValueError(f"slowest is {slowest} and fastest {fastest}; they must be ordered, between 0.5 and 2")
    if find_spec("hibari") is None or find_spec("onnxruntime") is None:
        raise ConfigError("hibari needs the packages hibari-tts and onnxruntime: pip install hibari-tts")
    settings = {"hibari": version("hibari-tts"), "voice": voice, "slowest": slowest, "fastest": fastest}

    def load(device: str) -> Generate:
        from hibari import Hibari

        try:
            tts = Hibari(voice=voice)
        except (KeyError, RuntimeError, OSError) as error:
            raise DataError(f"voice is {voice!r}, which hibari cannot load: {error}") from error

        def say(request: Request) -> Sample:
            speed = float(np.random.default_rng(request.seed).uniform(slowest, fastest))
            return wav(tts(request.prompt, speed=speed, seed=request.seed), tts.sample_rate)

        return lambda batch: [say(request) for request in batch]

    return Generator({**settings, "batch": batch_size}, load, batch_size, "audio")
