"""What some tests need, and what they say where it is missing."""

import os
import shutil
from pathlib import Path

import pytest

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler, and there is none"
)
needs_c = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="the kernel needs a C compiler (cc, or what CC names)"
)
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the program espeak-ng")


def asset(name: str) -> str:
    """Real data, or a real model, in the folder that ``FEDRAY_ASSETS`` names."""
    folder = os.environ.get("FEDRAY_ASSETS")
    if folder is None or not (Path(folder) / name).exists():
        pytest.skip(f"needs {name}: set FEDRAY_ASSETS to the folder that has it")
    return str(Path(folder) / name)
