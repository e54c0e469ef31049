"""What every test starts from: no network, one thread, and a Ray of our own."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import hypothesis
import pytest

from fedray.backends.ray.environment import prepare

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
if os.environ.get("FEDRAY_TEST_GPU") != "1":  # the same tests on every machine
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
prepare("local")  # before any test imports ray
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None)  # the same examples every time
hypothesis.settings.load_profile("seeded")


_LONG = ("test_tune", "test_ray", "test_ray_run", "test_storage", "test_docs", "test_prism_states")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray with more CPUs than there are; where there are no GPUs, with four for the scheduler only."""
    import torch

    from fedray.backends.ray.cluster import connected

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            if not torch.cuda.device_count():
                patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # Ray would not start with more than it names
            gpus = torch.cuda.device_count() or 4
            stack.enter_context(connected("local", object_store_gb=0.25, num_cpus=16, num_gpus=gpus))
        yield
