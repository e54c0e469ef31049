"""pfl-research, in one process, or in several by ``torch.distributed.run``.

python -m contenders.pfl
"""

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.dataset import Dataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from work import BATCH, HOLDERS, LR, Clock, given, load, loss


class Rounds(TrainingProcessCallback):
    """Ends a round, tests the model (in every process, so that none runs ahead), and starts the next round."""

    def __init__(self, clock, module):
        self._clock, self._module = clock, module

    def on_train_begin(self, *, model):
        self._clock.start()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        round = self._clock.stop()
        self._clock.test(round, self._module)
        self._clock.start()
        return False, Metrics()


def main() -> None:
    work = given()
    clock, module, (x, y) = Clock(work), work.build(), load(work)
    np.random.seed(0)
    module.loss = lambda inputs, labels: loss(module(inputs), labels)
    module.metrics = lambda *_: {}
    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), 1.0),
    )
    order = [client for cohort in work.schedule() for client in cohort]
    drawn = iter(order + order)  # pfl draws a little past the end
    users = FederatedDataset(
        lambda client: Dataset([x[client % HOLDERS], y[client % HOLDERS]], user_id=client), lambda: next(drawn)
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=work.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=LR, local_num_epochs=None, local_num_steps=work.steps, local_batch_size=BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=1000),
        callbacks=[Rounds(clock, module)],
    )
    if pytorch_ops.distributed.global_rank == 0:
        clock.write()


if __name__ == "__main__":
    main()
