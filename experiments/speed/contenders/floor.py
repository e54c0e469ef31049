"""The floor: a plain PyTorch loop without any framework.

    python -m contenders.floor PROCESSES [compile] [channels_last]

Each process keeps one model, loads the global parameters into it for every client, and adds up what its clients come
to; the sums meet in shared memory. Several processes stay alive from round to round, while the first one waits.
"""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
from torch import nn
from torch.func import functional_call, grad
from work import BATCH, HOLDERS, LR, Clock, Work, given, load, loss, trained

Share = Callable[[Sequence[int]], None]
Examples = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    processes, *flags = sys.argv[1:]
    work = given()
    clock, model, examples = Clock(work), work.build(), load(work)
    params = trained(model).values()
    shared = nn.utils.parameters_to_vector(params).detach().clone().share_memory_()
    sums = [torch.zeros_like(shared).share_memory_() for _ in range(int(processes))]
    if len(sums) == 1:
        train = trainer(work, examples, shared, sums[0], flags)
    else:
        train = spread([started(work, examples, shared, own, flags) for own in sums])
    for cohort in work.schedule():
        clock.start()
        train(cohort)
        torch.div(sum(sums[1:], start=sums[0]), len(cohort), out=shared)
        round = clock.stop()
        nn.utils.vector_to_parameters(shared, params)
        clock.test(round, model)
    clock.write()


def trainer(work: Work, examples: Examples, shared: torch.Tensor, total: torch.Tensor, flags: list[str]) -> Share:
    """A function that trains some clients, and leaves the sum of their parameters in ``total``, where that is."""
    model = work.build().to(total.device)
    if "channels_last" in flags:
        model = model.to(memory_format=torch.channels_last)
    names, params = list(trained(model)), list(trained(model).values())
    start, sums, (x, y) = views(shared, params), views(total, params), examples

    def step(params: list[torch.Tensor], inputs: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        gradients = torch.autograd.grad(loss(model(inputs), labels), params)
        with torch.no_grad():
            torch._foreach_add_(params, gradients, alpha=-LR)
        return params

    def loss_of(params: list[torch.Tensor], inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(model, dict(zip(names, params, strict=True)), (inputs,)), labels)

    @torch.compile(fullgraph=True, dynamic=False)
    def compiled_step(params: list[torch.Tensor], inputs: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        return [
            param - LR * gradient for param, gradient in zip(params, grad(loss_of)(params, inputs, labels), strict=True)
        ]

    def share(clients: Sequence[int]) -> None:
        total.zero_()
        for client in clients:
            inputs, labels = x[client % HOLDERS], y[client % HOLDERS]
            if "compile" in flags:
                ended, one_step = start, torch.no_grad()(compiled_step)
            else:
                ended, one_step = params, step
                with torch.no_grad():
                    torch._foreach_copy_(params, start)
            for k in range(0, work.steps * BATCH, BATCH):
                ended = one_step(ended, inputs[k : k + BATCH], labels[k : k + BATCH])
            with torch.no_grad():
                torch._foreach_add_(sums, ended)

    return share


def views(vector: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """The parts of a vector, in the shapes of the parameters."""
    return [part.view(p.shape) for part, p in zip(vector.split([p.numel() for p in like]), like, strict=True)]


def spread(pipes: list[Connection]) -> Share:
    """A function that has every process train its part of a cohort."""

    def share(clients: Sequence[int]) -> None:
        for k, pipe in enumerate(pipes):
            pipe.send(clients[k :: len(pipes)])
        for pipe in pipes:
            pipe.recv()

    return share


def started(work: Work, examples: Examples, shared: torch.Tensor, total: torch.Tensor, flags: list[str]) -> Connection:
    """The end of a pipe, at whose other end a process trains."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    context.Process(target=serve, args=(there, work, examples, shared, total, flags), daemon=True).start()
    here.recv()  # once it is ready
    return here


def serve(
    pipe: Connection, work: Work, examples: Examples, shared: torch.Tensor, total: torch.Tensor, flags: list[str]
) -> None:
    torch.set_num_threads(1)
    share = trainer(work, examples, shared, total, flags)
    pipe.send(None)
    while True:
        share(pipe.recv())
        pipe.send(None)


if __name__ == "__main__":
    main()
