"""Federated algorithms, one file each, by name."""

from collections.abc import Callable

from fedray.algorithm import FederatedAlgorithm
from fedray.algorithms.baselines import centralized, local_only
from fedray.algorithms.dp_fedavg import dp_fedavg
from fedray.algorithms.dp_fedavg_gan import dp_fedavg_gan
from fedray.algorithms.fedavg import fedavg
from fedray.algorithms.fedbuff import fedbuff
from fedray.algorithms.feddyn import feddyn
from fedray.algorithms.fedlora import fedlora
from fedray.algorithms.fednova import fednova
from fedray.algorithms.fedopt import fedadagrad, fedadam, fedavgm, fedyogi
from fedray.algorithms.fedprox import fedprox
from fedray.algorithms.fgl import fgl
from fedray.algorithms.gpt_fl import gpt_fl
from fedray.algorithms.md_gan import md_gan
from fedray.algorithms.moon import moon
from fedray.algorithms.prism import prism
from fedray.algorithms.scaffold import scaffold

ALGORITHMS: dict[str, Callable[..., FederatedAlgorithm]] = {
    "fedavg": fedavg,
    "fedprox": fedprox,
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "scaffold": scaffold,
    "fednova": fednova,
    "feddyn": feddyn,
    "moon": moon,
    "fedbuff": fedbuff,
    "dp_fedavg": dp_fedavg,
    "fedlora": fedlora,
    "gpt_fl": gpt_fl,
    "prism": prism,
    "dp_fedavg_gan": dp_fedavg_gan,
    "md_gan": md_gan,
    "fgl": fgl,
    "local_only": local_only,
    "centralized": centralized,
}
