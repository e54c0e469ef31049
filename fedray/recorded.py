"""A recorded training step. On a GPU a small model's kernels are shorter than the time that it takes to launch them.

A CUDA graph launches all kernels of a step at once. It has the bits of the step itself, so that recording is no choice
of the configuration's bytes; what cannot be recorded is computed as it is.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from fedray.local_training import Gradients

if TYPE_CHECKING:
    from fedray.learner import Columns

Compute = Callable[["Columns"], tuple[torch.Tensor, Gradients]]

_PATIENCE = 2  # steps with batches of a shape, before a step with such batches is recorded
_MOST = 8  # recordings, each for a shape of batches
_LARGEST = 1 << 29  # bytes that a step needs for itself; beyond, its kernels outlast their launching


class RecordedStep:
    """The mean loss of a batch and its gradients: what ``compute`` gives, to the bit.

    The tensors that it returns are written to by the next call.

    Args:
        compute: The step; a function of the batch and of tensors that stay where they are.
        params: Those that it computes the gradients of.
        model: What it computes with.
    """

    def __init__(self, compute: Compute, params: Sequence[torch.Tensor], model: torch.nn.Module) -> None:
        self._compute, self._params, self._model = compute, params, model
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, Compute] = {}
        self._refused = False

    def __call__(self, batch: "Columns") -> tuple[torch.Tensor, Gradients]:
        """The mean loss of a batch, and its gradients."""
        shape = tuple((name, x.shape, x.stride(), x.dtype) for name, x in batch.items())
        if shape in self._recordings:
            return self._recordings[shape](batch)
        self._seen[shape] += 1
        if self._refused or self._seen[shape] <= _PATIENCE or len(self._recordings) == _MOST:
            return self._compute(batch)
        recording = _recording(self._compute, self._params, self._model, batch)
        if recording is None:
            self._refused = True
            return self._compute(batch)
        self._recordings[shape] = recording
        return recording(batch)


def _recording(
    compute: Compute, params: Sequence[torch.Tensor], model: torch.nn.Module, batch: "Columns"
) -> Compute | None:
    """The step for batches like this one, recorded; None if it cannot be, or if its kernels take their time."""
    device = next(iter(batch.values())).device
    with torch.cuda.device(device), suppress(RuntimeError):  # it waits for the GPU, or there is no memory for two
        stream = torch.cuda.Stream()
        found = _tried(compute, list(model.buffers()), batch, stream)
        return _recorded(compute, params, batch, stream, found) if found else None
    return None


def _tried(
    compute: Compute, buffers: list[torch.Tensor], batch: "Columns", stream: torch.cuda.Stream
) -> tuple[torch.Tensor, Gradients] | None:
    """What the step comes to; None if it draws, writes into buffers or takes much memory. It leaves no trace.

    Raises:
        RuntimeError: it waits for the GPU, so that what it does may depend on what it finds there.
    """
    kept, versions = [buffer.clone() for buffer in buffers], [buffer._version for buffer in buffers]
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            compute(batch)  # the first one on a stream may have to wait for its workspace
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with _no_waiting():
                found = compute(batch)
        torch.cuda.synchronize()
        writes = [buffer._version for buffer in buffers] != versions
        draws = not all(map(torch.equal, (torch.get_rng_state(), torch.cuda.get_rng_state()), drawn))
        return None if writes or draws or torch.cuda.max_memory_allocated() - before > _LARGEST else found
    finally:
        for buffer, old, version in zip(buffers, kept, versions, strict=True):
            if buffer._version != version:
                buffer.copy_(old)
        torch.set_rng_state(drawn[0])
        torch.cuda.set_rng_state(drawn[1])


def _recorded(
    compute: Compute,
    params: Sequence[torch.Tensor],
    batch: "Columns",
    stream: torch.cuda.Stream,
    expected: tuple[torch.Tensor, Gradients],
) -> Compute | None:
    """The recording; None if it does not come to what is expected."""
    graph, inputs = torch.cuda.CUDAGraph(), {name: x.clone() for name, x in batch.items()}
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        loss, found = compute(inputs)
        # laid out like the params, so that a step of all of them is one kernel
        pairs = zip(params, found, strict=True)
        gradients = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in pairs]
    columns = list(inputs.values())

    def recorded(batch: "Columns") -> tuple[torch.Tensor, Gradients]:
        torch._foreach_copy_(columns, list(batch.values()))
        graph.replay()
        return loss, gradients

    recorded(batch)
    same = map(torch.equal, [loss, *gradients], [expected[0], *expected[1]])
    return recorded if all(same) else None


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within, whatever makes the program wait for the GPU raises RuntimeError; a recording could not hold it."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
