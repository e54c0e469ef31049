"""Flower's simulation, tuned: two Ray actors with one model each, which stays in its actor between messages.

python -m contenders.flower
"""

import tempfile
import time
from functools import cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import BATCH, EXAMPLES, HOLDERS, LR, Clock, given, load, loss, trained

client_app, server_app = ClientApp(), ServerApp()


@cache
def resident():
    """What an actor keeps."""
    return given(), given().build(), load(given())


@client_app.train()
def train(message: Message, _context: Context) -> Message:
    work, model, (x, y) = resident()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)  # all but what is frozen
    holder = message.content["config"]["client"] % HOLDERS
    optimizer = torch.optim.SGD(trained(model).values(), lr=LR)
    for k in range(0, work.steps * BATCH, BATCH):
        optimizer.zero_grad()
        loss(model(x[holder, k : k + BATCH]), y[holder, k : k + BATCH]).backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(trained(model)), "metrics": MetricRecord({"num-examples": EXAMPLES})}
    return Message(content=RecordDict(content), reply_to=message)


class TimedFedAvg(FedAvg):
    """FedAvg of given cohorts; a round lasts from the start of configure_train to the end of aggregate_train."""

    def __init__(self, clock, schedule, nodes, **options):
        super().__init__(**options)
        self._clock, self._schedule, self._nodes = clock, schedule, nodes

    def configure_train(self, server_round, arrays, config, grid):
        self._clock.start()
        # Flower's node ids are random numbers; the client's number rides in the message
        return [
            Message(
                RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: ConfigRecord({"client": client})}),
                dst_node_id=self._nodes[client],
                message_type="train",
            )
            for client in self._schedule[server_round - 1]
        ]

    def aggregate_train(self, server_round, replies):
        aggregated = super().aggregate_train(server_round, replies)
        self._clock.stop()
        return aggregated


@server_app.main()
def serve(grid: Grid, _context: Context) -> None:
    work = given()
    clock, model = Clock(work), work.build()
    while len(list(grid.get_node_ids())) < work.population:
        time.sleep(0.1)
    strategy = TimedFedAvg(
        clock,
        work.schedule(),
        list(grid.get_node_ids()),
        fraction_evaluate=0.0,
        min_train_nodes=work.cohort,
        min_available_nodes=work.population,
    )

    def test(round: int, arrays: ArrayRecord) -> None:
        if work.evaluates(round):
            model.load_state_dict(arrays.to_torch_state_dict(), strict=False)
            clock.test(round, model)

    initial = ArrayRecord(trained(model))
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=work.rounds, evaluate_fn=test)
    clock.write()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cluster = {"_temp_dir": folder, "address": "local", "num_cpus": 2, "log_to_driver": False}
        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=given().population,
            backend_config={"init_args": cluster, "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}},
        )


if __name__ == "__main__":
    from contenders import flower  # by its name, so that actors import it once instead of receiving it every time

    flower.main()
