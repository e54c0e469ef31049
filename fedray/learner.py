"""Local training. The model is scratch space: every call first loads the params that it is given."""

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch

from fedray import channels_last
from fedray.algorithm import Client, Metrics
from fedray.clock import Clock
from fedray.compiled import CompiledStep
from fedray.dense import StepInBackward, dense_layers, stepping
from fedray.errors import ConfigError
from fedray.execution import ONE_BY_ONE, Execution
from fedray.frozen import past_frozen
from fedray.groups import Group, dependence, is_stackable
from fedray.groups import train as train_group
from fedray.hardware import device_of
from fedray.local_training import Gradients, LocalResult, LocalTraining, num_examples, stepper
from fedray.per_example import GradientsOf, one_by_one, private, together
from fedray.precision import InBfloat16
from fedray.privacy import Mechanism
from fedray.recorded import RecordedStep
from fedray.stacked import StackedModel, unknown_layer
from fedray.trees import Params

Columns = dict[str, torch.Tensor]  # examples: tensors that share their first dimension
LossFunction = Callable[[torch.nn.Module, Columns], torch.Tensor]

_BLOCK = 256  # examples evaluated at a time
_RESIDENT = 1 << 26  # bytes of a client's examples, up to which they are prepared once and not batch by batch


class Task(Protocol):
    """What is learnt from what; the only class that a new problem has to write.

    A task is sent to every worker once, so it holds numpy arrays (which workers share) and small values.
    """

    @property
    def average_buffers(self) -> bool:
        """Whether BatchNorm's running statistics are averaged like parameters."""
        ...

    @property
    def augments(self) -> bool:
        """Whether ``prepare`` draws random numbers for training."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, shape (num_clients,)."""
        ...

    def holdings(self) -> dict[str, np.ndarray]:
        """Who holds what, as arrays for the run folder's ``partition.npz``."""
        ...

    def model(self) -> torch.nn.Module:
        """A new model with the initial parameters; every call gives the same."""
        ...

    def examples(self, client: int) -> Columns:
        """The raw training examples of one client, or of all with ``EVERYONE``."""
        ...

    def test_examples(self, start: int, stop: int) -> Columns:
        """A slice of the raw test examples."""
        ...

    @property
    def num_test_examples(self) -> int:
        """How many test examples there are."""
        ...

    def prepare(self, examples: Columns, generator: torch.Generator | None) -> Columns:
        """Raw examples to the model's inputs; with a generator (training) also augmented."""
        ...

    def loss(self, model: torch.nn.Module, batch: Columns) -> torch.Tensor:
        """The mean training loss of a batch."""
        ...

    @property
    def losses(self) -> LossFunction | None:
        """The training loss of each example, whose mean is ``loss``; None if there is no such thing."""
        ...

    def evaluate(self, model: torch.nn.Module, batch: Columns) -> dict[str, Any]:
        """Sums over a batch (tensors of whole numbers, or floats) that can be added over batches, and `Rows`."""
        ...

    def summarize(self, sums: dict[str, Any]) -> tuple[Metrics, dict[str, Any]]:
        """The sums over the test set to metrics, and to details for the report (JSON values)."""
        ...


class Learner:
    """A task, a device and one scratch model.

    Where a model's first part is frozen, ``task`` and ``model`` begin after it (`fedray.frozen`).

    Args:
        task: What is learnt.
        device: ``auto`` for a CUDA device where there is one, or a PyTorch device name.
        execution: How clients are computed.

    Raises:
        ConfigError: the model has BatchNorm and nobody chose to average its statistics.
    """

    def __init__(self, task: Task, device: str = "auto", execution: Execution = ONE_BY_ONE) -> None:
        self.device = device_of(device)
        self.task, model = past_frozen(task, task.model().to(self.device))
        self._exact = self.task
        if execution.precision == "bfloat16":
            self.task = InBfloat16(self.task, self.device)
        self._channels_last = execution.puts_channels_last(model, self.device)
        self.model = channels_last.lay_out(model) if self._channels_last else model
        self._trained: Params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._buffers = _running_statistics(self.model, task.average_buffers)
        self._frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        self._pretrained: dict[str, torch.Tensor] = {}  # of frozen params that are another's for now
        self._kept = [buffer for name, buffer in self.model.named_buffers() if name not in self._buffers]
        self._initially = [buffer.clone() for buffer in self._kept]
        self._stacked: StackedModel | None = None
        self._compiles = execution.compile
        self._compiled: dict[tuple[object, ...], CompiledStep] = {}  # by a batch's size and what is trained
        self._records = execution.cuda_graphs and self.device.type == "cuda"
        self._recorded: dict[tuple[str, ...], RecordedStep] = {}  # by what is trained
        self.clock = Clock()

    def params(self) -> Params:
        """A copy of what is communicated: the trained parameters and, if averaged, the buffers."""
        own = {name: p.detach() for name, p in {**self._trained, **self._buffers}.items()}
        copies = {name: torch.empty_like(p, memory_format=torch.contiguous_format) for name, p in own.items()}
        torch._foreach_copy_(list(copies.values()), list(own.values()))
        return copies

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every trained parameter."""
        return {name: p.shape for name, p in self._trained.items()}

    def load(self, params: Params) -> torch.nn.Module:
        """Copy ``params`` into the scratch model, and return it.

        They may hold frozen parameters too, which an algorithm has changed; the others are the model's own.
        """
        own = {**self._trained, **self._buffers}
        odd = (own.keys() - params.keys()) | (params.keys() - own.keys() - self._frozen.keys())
        if odd:
            raise ValueError(f"the params differ from the model's in {sorted(odd)}")
        with torch.no_grad(), self.clock("load"):
            torch._foreach_copy_(list(own.values()), [params[name] for name in own])
        self.freeze(params)
        return self.fresh()

    def freeze(self, params: Params) -> None:
        """Let frozen parameters be those in ``params``, and the model's own where it has none."""
        for name in [name for name in self._pretrained if name not in params]:
            self._frozen[name].data = self._pretrained.pop(name)
        for name in params.keys() & self._frozen.keys():  # replaced, not written to: other models may share them
            self._pretrained.setdefault(name, self._frozen[name].data)
            self._frozen[name].data = params[name].to(self.device)

    def fresh(self) -> torch.nn.Module:
        """The scratch model, where layers find what they keep from step to step as it was in the beginning."""
        if self._kept:
            torch._foreach_copy_(self._kept, self._initially)
        return self.model

    def stacked(self) -> StackedModel:
        """The scratch model for a group of clients, in training mode."""
        if self._stacked is None:
            self._stacked = StackedModel(self.model)
        self.fresh()
        self._stacked.model.train()
        return self._stacked

    def train(
        self,
        start: Params,
        client: Client | Group,
        local: LocalTraining,
        correction: Params | None = None,
        proximal: float = 0.0,
        loss: LossFunction | None = None,
        examples: Columns | None = None,
        only: Collection[str] | None = None,
        privacy: Mechanism | None = None,
        moments: Params | None = None,
    ) -> LocalResult:
        """Train from ``start`` on a client's examples.

        Args:
            start: The params to start from; not written to.
            client: Whose examples, seed and round; a group trains together, and its result is stacked.
            local: How to train.
            correction: A tree that is added to every gradient.
            proximal: μ of a term μ/2·‖params − start‖², whose gradient is added exactly.
            loss: Instead of the task's loss.
            examples: Instead of the client's examples; may have more columns, which the loss then meets.
            only: The names of the params that are trained; None for all.
            privacy: Whose noise every step gets; None for no noise.
            moments: Adam's moments, which training goes on from and writes to; {} to begin with, None to forget them.
        """
        if isinstance(client, Group):
            if loss is not None or examples is not None or privacy is not None or moments is not None:
                raise ValueError(
                    "a group trains with its task's loss and examples, without noise, and keeps no moments; "
                    "call map_reduce without grouped=True"
                )
            seed_draws(client.members[0].seed, self.device)
            return train_group(self, start, client, local, correction, proximal, only)
        if privacy is not None and privacy.unit == "example" and self._buffers:
            raise ValueError(
                "dp_sgd bounds what an example does to gradients, but BatchNorm's statistics are sent as they are; "
                "use a model with group norm"
            )
        if loss is not None and isinstance(self.task, InBfloat16):
            loss = self.task.mixed(loss)
        held = self.task.examples(client.id) if examples is None else examples
        length = num_examples(held)

        def alone(lr: float | None) -> LocalResult:
            """With a learning rate, the compiled step makes the step, or the backward pass that of dense layers."""
            self.load(start).train()
            params = {name: p for name, p in self._trained.items() if only is None or name in only}
            leaves = list(params.values())
            step = stepper(leaves, params, start, local, client.round, correction, proximal, moments=moments)
            # some mechanisms keep several steps' gradients
            recorded = self._records and loss is None and privacy is None
            gradients_of, batches_of = self._gradients(params, local.batch_size, loss, recorded, lr), local.batches
            if privacy is not None:
                each, expected = self._examples_gradients(params, gradients_of, loss), local.rate(length) * length
                gradients_of = private(gradients_of, each, params, privacy, expected, client.seed)
                batches_of = local.poisson_batches if privacy.unit == "example" else local.batches
            num_steps = num_seen = 0
            total_loss = torch.zeros((), device=self.device)
            generator = torch.Generator().manual_seed(client.seed)
            seed_draws(client.seed, self.device)  # for dropout and the like; the worker restores the caller's generator
            batch_of = self.ready(held, generator)
            for rows in batches_of(length, generator):
                batch_loss, gradients = gradients_of(batch_of, rows)
                with torch.no_grad():
                    step(gradients)
                    total_loss += batch_loss * len(rows)
                del gradients  # or the next ones would get other memory, which no cache holds
                num_steps, num_seen = num_steps + 1, num_seen + len(rows)
            return LocalResult(self.params(), num_steps, length, total_loss.item() / max(1, num_seen))

        if not local.is_plain_sgd or proximal or privacy is not None:
            return alone(None)
        if self._compiles and loss is None:
            return alone(local.lr(client.round))
        if self.device.type == "cpu":  # a recorded step gives its gradients away, and a GPU's memory is fast
            with suppress(RuntimeError):  # a weight was written to that the backward pass had yet to read elsewhere
                return alone(local.lr(client.round))
        return alone(None)

    def _gradients(
        self, params: Params, size: int, loss: LossFunction | None, recorded: bool = False, lr: float | None = None
    ) -> Callable[..., tuple[torch.Tensor, Gradients]]:
        """The mean loss of the scratch model over a batch, and its gradients: a function of ``ready``'s and of rows."""
        loss_of, leaves = loss or self.task.loss, list(params.values())
        layers = dense_layers(self.model, leaves) if lr is not None else []

        def of_batch(batch: Columns) -> tuple[torch.Tensor, Gradients]:
            early = StepInBackward()
            with stepping(layers, early):
                batch_loss = loss_of(self.model, batch)
            return batch_loss.detach(), early.grad(batch_loss, leaves, lr)

        if loss is not None or not self._compiles:
            compute: Callable[[Columns], tuple[torch.Tensor, Gradients]] = of_batch
            if recorded and not self._pretrained:  # frozen params of another's would lie elsewhere
                made = RecordedStep(of_batch, leaves, self.model)
                compute = self._recorded.setdefault(tuple(params), made)
            return lambda batch_of, rows: compute(batch_of(rows))
        key = (size, *params)
        if key not in self._compiled:
            self._compiled[key] = CompiledStep(self.task, self.model, params, size)
        step, rate = self._compiled[key], None if lr is None else torch.tensor(lr, device=self.device)
        return lambda batch_of, rows: step(batch_of(step.rows(rows)), len(rows), rate)

    def _examples_gradients(self, params: Params, gradients_of: GradientsOf, loss: LossFunction | None) -> GradientsOf:
        """The loss of each example and its own gradients, in one backward pass where the layers allow it."""
        losses = self.task.losses
        if loss is not None or losses is None or not self._is_stackable:
            return partial(one_by_one, gradients_of)
        return partial(together, self.stacked(), self._trained, params, losses)

    @cached_property
    def _is_stackable(self) -> bool:
        kept = [p.detach().clone() for p in self._trained.values()]
        found = dependence(self._exact, self.model) is None and unknown_layer(self.model) is None
        found = found and is_stackable(self._exact, self.model)
        with torch.no_grad():  # the trial wrote into the scratch model
            torch._foreach_copy_(list(self._trained.values()), kept)
        return found

    def features(self, params: Params, examples: Columns) -> torch.Tensor:
        """``model.features`` of every example, shape (n, d), in evaluation mode."""
        model = self.load(params).eval()
        with torch.no_grad():
            blocks = [model.features(block["x"]) for block in self._blocks(examples)]  # type: ignore[operator]
        return torch.cat(blocks)

    def evaluate(self, params: Params, examples: Columns) -> dict[str, Any]:
        """The task's sums over the examples, in evaluation mode."""
        model = self.load(params).eval()
        sums: dict[str, Any] = {}
        with torch.no_grad(), self.clock("evaluate"):
            for block in self._blocks(examples):
                for name, value in self.task.evaluate(model, block).items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def test(self, params: Params) -> Metrics:
        """The task's metrics over the whole test set."""
        examples = self.task.test_examples(0, self.task.num_test_examples)
        return self.task.summarize(self.evaluate(params, examples))[0]

    def prepare(self, examples: Columns, generator: torch.Generator | None = None) -> Columns:
        """The task's ``prepare``, on this learner's device."""
        there = {name: column.to(self.device, non_blocking=True) for name, column in examples.items()}
        batch = self.task.prepare(there, generator)
        return {name: channels_last.laid_out(x) for name, x in batch.items()} if self._channels_last else batch

    def ready(self, examples: Columns, generator: torch.Generator | None = None) -> Callable[[torch.Tensor], Columns]:
        """A function from rows of ``examples`` to a batch that is prepared for training."""
        size = sum(column.numel() * max(4, column.element_size()) for column in examples.values())
        if self.task.augments or size > _RESIDENT:
            return lambda rows: self.prepare({name: column[rows] for name, column in examples.items()}, generator)
        whole = self.prepare(examples)

        def batch_of(rows: torch.Tensor) -> Columns:
            rows = rows.to(self.device, non_blocking=True)  # once, and without waiting for the steps before it
            return {name: channels_last.select(x, rows) for name, x in whole.items()}

        return batch_of

    def _blocks(self, examples: Columns) -> Iterator[Columns]:
        for start in range(0, num_examples(examples), _BLOCK):
            yield self.prepare({name: column[start : start + _BLOCK] for name, column in examples.items()})


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed the global generators; ``torch.manual_seed`` asks every kind of device, which costs more than a step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _running_statistics(model: torch.nn.Module, average: bool) -> dict[str, torch.Tensor]:
    statistics: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.track_running_stats:
            if not average and any(p.requires_grad for p in model.parameters()):
                raise ConfigError(
                    f"the model's {path or 'root'} is {type(module).__name__}, whose running statistics are not "
                    "trained parameters: clients would evaluate with statistics that nobody aggregated. Use group "
                    "norm (norm: group), or average the statistics by choice (task.batch_norm=average)"
                )
            if average:
                prefix = f"{path}." if path else ""
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        statistics[prefix + name] = buffer
    return statistics
