"""What every test starts from: no network, one thread, and a Ray of our own."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from fedray.backends.ray.environment import prepare

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
prepare("local")  # before any test imports ray
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None)  # the same examples every time
hypothesis.settings.load_profile("seeded")


_LONG = ("test_tune", "test_ray", "test_ray_run", "test_storage", "test_docs", "test_prism_states")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray with more CPUs than there are, and four GPUs that exist for the scheduler only."""
    from fedray.backends.ray.cluster import connected

    with connected("local", object_store_gb=0.25, num_cpus=16, num_gpus=4):
        yield


@pytest.fixture
def assets() -> Path:
    """The folder of real data and models that ``FEDRAY_ASSETS`` names."""
    folder = os.environ.get("FEDRAY_ASSETS")
    if not folder:
        pytest.skip("FEDRAY_ASSETS is not set; it names a folder with cifar10/, fsdd/ and emoji64.npz")
    return Path(folder)
