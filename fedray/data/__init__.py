"""Data sets, and how their examples are dealt out to clients."""

from fedray.data.dataset import Dataset
from fedray.data.datasets import digits, fashion_mnist, mnist, npz, public_split, subset
from fedray.data.domains import described
from fedray.data.hub import cifar10, hub
from fedray.data.partitions import (
    Partition,
    by_column,
    classes_per_client,
    dirichlet,
    iid,
    quantity_skew,
    shards,
)
from fedray.data.text import sotu, text

__all__ = ["DATASETS", "PARTITIONS", "Dataset", "Partition"]

DATASETS = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "hub": hub,
    "npz": npz,
    "sotu": sotu,
    "text": text,
    "subset": subset,
    "public_split": public_split,
    "described": described,
}

PARTITIONS = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "classes_per_client": classes_per_client,
    "by_column": by_column,
    "quantity_skew": quantity_skew,
}
