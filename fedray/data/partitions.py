"""Who holds which training examples: schemes that deal a data set out to clients.

Every scheme is a pure function of (data, seed, options) and gives each example to one client at most. It computes one
``owner`` per example; a client's examples then stand in ascending order.
"""

import difflib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedray.data.dataset import Dataset
from fedray.errors import DataError

_NOBODY = -1


@dataclass(frozen=True, eq=False)
class Partition:
    """Positions in the training set for each client, in compressed rows: 10,000 clients are two arrays.

    Attributes:
        indices: int64; all clients' positions, one client after the other, no position twice.
        offsets: int64 of num_clients + 1; client i holds ``indices[offsets[i]:offsets[i + 1]]``.
        names: what the clients are called, if they are natural ones (speakers, domains); else ().
    """

    indices: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rising = self.offsets.ndim == 1 and len(self.offsets) >= 2 and bool((np.diff(self.offsets) >= 0).all())
        if not rising or self.offsets[0] != 0 or self.offsets[-1] != len(self.indices):
            raise ValueError(f"offsets must rise from 0 to {len(self.indices)}, the number of indices")
        if self.names and len(self.names) != self.num_clients:
            raise ValueError(f"names has {len(self.names)} entries for {self.num_clients} clients")
        for name in ("indices", "offsets"):
            view = np.ascontiguousarray(getattr(self, name), dtype=np.int64).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Examples per client, int64 of shape (num_clients,)."""
        return np.diff(self.offsets)

    def client(self, client: int) -> np.ndarray:
        """The positions that a client holds: a view, ascending.

        >>> Partition(np.array([3, 5, 4]), np.array([0, 2, 3])).client(1)
        array([4])
        """
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} does not exist; there are clients 0..{self.num_clients - 1}")
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    def label_counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Examples per client and class, int64 of shape (num_clients, num_classes); ``labels`` is the whole ``y``."""
        client = np.repeat(np.arange(self.num_clients), self.sizes)
        cell = client * num_classes + labels[self.indices]
        counts = np.bincount(cell, minlength=self.num_clients * num_classes)
        return counts.reshape(self.num_clients, num_classes)

    def save(self, path: str | Path, arguments: Mapping[str, Any] | None = None) -> None:
        """Write an .npz file (no pickle) that ``load`` reads; ``arguments`` are kept in it as JSON, for the record."""
        with Path(path).open("wb") as file:
            np.savez(
                file,
                indices=self.indices,
                offsets=self.offsets,
                names=np.array(self.names, np.str_),
                arguments=np.array(json.dumps(dict(arguments or {}), sort_keys=True)),
            )

    @classmethod
    def load(cls, path: str | Path) -> "Partition":
        """Read what ``save`` wrote.

        Raises:
            DataError: naming the file, if it is missing, corrupt, or no partition.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["indices"], file["offsets"], tuple(str(name) for name in file["names"]))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; a run folder has its partition.npz") from None
        except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no readable partition ({error}); run again to make it anew") from error


def iid(data: Dataset, seed: int, /, num_clients: int) -> Partition:
    """Independent and identical: a random permutation cut into equal parts (sizes differ by one at most).

    Args:
        num_clients: number of clients.
    """
    n = _check_clients(data, num_clients)
    owner = np.empty(n, np.int64)
    owner[np.random.default_rng(seed).permutation(n)] = np.arange(n) * num_clients // n
    return _deal(owner, num_clients)


def dirichlet(
    data: Dataset,
    seed: int,
    /,
    num_clients: int,
    alpha: float = 0.5,
    min_size: int = 1,
    balanced: bool = True,
    fill_empty: bool = True,
    max_tries: int = 1000,
) -> Partition:
    """Label skew: each class is divided among the clients by shares drawn from a Dirichlet distribution.

    For each class k: q ~ Dir(alpha·1_N), and its n_k shuffled examples are cut at floor(cumsum(q)·n_k). The whole is
    redrawn until every client has ``min_size`` examples. Source: Hsu, Qi and Brown, arXiv:1909.06335; with the capacity
    rule and the retry as in Lin et al., arXiv:2006.07242, which FedPEFT, GPT-FL and PRISM use. Complete.

    If every share left by the capacity rule is zero (alpha near 0), one eligible client, drawn at random, takes the
    class: the limit of the Dirichlet distribution. ``fill_empty`` is ours; it leaves min_size 1 nothing to retry for.

    Args:
        num_clients: number of clients.
        alpha: concentration; the smaller, the fewer classes a client holds.
        min_size: examples that every client must have; the papers use 5, 10 or 32.
        balanced: the capacity rule: a client that holds the mean number of examples gets none of the further classes.
        fill_empty: give each client left empty by a draw one example of the largest client's largest class.
        max_tries: draws after which to give up on min_size.
    """
    n = _check_clients(data, num_clients, max(min_size, 1 if fill_empty else 0), "min_size" if min_size > 1 else "")
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha}; it must be > 0 and finite")
    if min_size < 0:
        raise ValueError(f"min_size is {min_size}; it must be >= 0")
    if max_tries < 1:
        raise ValueError(f"max_tries is {max_tries}; it must be >= 1")
    y, rng, best = data.train["y"], np.random.default_rng(seed), 0
    totals = np.bincount(y, minlength=data.num_classes)
    for _ in range(max_tries):  # sizes only: the examples are dealt once, when the sizes will do
        counts = _dirichlet_counts(totals, num_clients, alpha, balanced, rng)
        if fill_empty:
            _fill_empty(counts)
        smallest = int(counts.sum(axis=1).min())
        if smallest >= min_size:
            break
        best = max(best, smallest)
    else:
        raise ValueError(
            f"min_size is {min_size}; in {max_tries} draws the smallest of {num_clients} clients had at best {best} of "
            f"{n} examples (alpha {alpha}): lower min_size or num_clients, or raise alpha or max_tries"
        )
    return _deal(_by_counts(y, counts, rng), num_clients)


def shards(data: Dataset, seed: int, /, num_clients: int, shards_per_client: int = 2) -> Partition:
    """Label shards: examples sorted by label, cut into equal shards; each client draws some without replacement.

    Source: McMahan et al., arXiv:1602.05629, section 3 (2 a client); PRISM uses 4. Complete: where the examples do not
    divide evenly, shards differ by one.

    Args:
        num_clients: number of clients.
        shards_per_client: shards that each client holds.
    """
    if shards_per_client < 1:
        raise ValueError(f"shards_per_client is {shards_per_client}; it must be >= 1")
    n = _check_clients(data, num_clients, shards_per_client, "shards_per_client")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(n)
    by_label = shuffled[np.argsort(data.train["y"][shuffled], kind="stable")]
    holder = rng.permutation(np.repeat(np.arange(num_clients), shards_per_client))
    owner = np.empty(n, np.int64)
    owner[by_label] = holder[np.arange(n) * len(holder) // n]
    return _deal(owner, num_clients)


def classes_per_client(data: Dataset, seed: int, /, num_clients: int, num_classes: int = 2) -> Partition:
    """Each client holds exactly so many classes; a class is divided equally among its holders.

    Clients choose in turn, at random among the classes held by the fewest: holders per class differ by one at most, and
    every class is held if num_clients·num_classes allows. Complete then; a class that nobody holds is left out.
    Source: the quantity-based label imbalance of Li et al., arXiv:2102.02079, section 4.1, with balanced choices.

    Args:
        num_clients: number of clients.
        num_classes: classes that each client holds.
    """
    y, rng = data.train["y"], np.random.default_rng(seed)
    _check_clients(data, num_clients)
    totals = np.bincount(y, minlength=data.num_classes)
    present = np.flatnonzero(totals)
    if not 1 <= num_classes <= len(present):
        raise ValueError(f"num_classes is {num_classes}; it must be 1..{len(present)}, the classes that have examples")
    holds = np.zeros((num_clients, data.num_classes), np.int64)
    holders = np.zeros(len(present), np.int64)
    for row in holds:
        chosen = np.lexsort((rng.random(len(present)), holders))[:num_classes]
        holders[chosen] += 1
        row[present[chosen]] = 1
    for k, count in zip(present, holders, strict=True):
        if count > totals[k]:
            raise ValueError(
                f"num_clients is {num_clients}; {count} of them hold class {data.classes[k]!r}, which has {totals[k]} "
                "examples: lower num_clients or num_classes"
            )
    place = np.cumsum(holds, axis=0) - holds  # 0, 1, 2 ... among the holders of a class
    share, extra = np.divmod(totals, np.maximum(holds.sum(axis=0), 1))
    return _deal(_by_counts(y, holds * (share + (place < extra)), rng), num_clients)


def by_column(data: Dataset, seed: int, /, column: str, num_clients: int | None = None) -> Partition:
    """Natural clients: one per value of a column (speaker, domain, writer), or the values dealt out to fewer clients.

    Complete. With one client per value the clients are in the order of the values and bear their names.

    Args:
        column: column of the data set; y deals out by class.
        num_clients: null for one per value; else the values are shuffled and dealt out, equally many to each.
    """
    known = sorted(set(data.train) - {"x"})
    if column not in known:
        close = difflib.get_close_matches(column, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"{data.name} has {', '.join(known)}"
        raise ValueError(f"column is {column!r}, which {data.name} does not have; {hint}")
    values, code = np.unique(data.train[column], return_inverse=True)
    if num_clients is None:
        names = [data.classes[v] for v in values] if column == "y" else [str(v) for v in values]
        return _deal(code, len(values), tuple(names))
    if not 1 <= num_clients <= len(values):
        raise ValueError(f"num_clients is {num_clients}; column {column!r} has {len(values)} values: 1..{len(values)}")
    client = np.empty(len(values), np.int64)
    client[np.random.default_rng(seed).permutation(len(values))] = np.arange(len(values)) % num_clients
    return _deal(client[code], num_clients)


def quantity_skew(
    data: Dataset,
    seed: int,
    /,
    num_clients: int,
    law: Literal["dirichlet", "lognormal"] = "dirichlet",
    beta: float = 0.5,
    sigma: float = 1.0,
    min_size: int = 1,
) -> Partition:
    """Clients of unequal size whose labels are alike: sizes by a Dirichlet or log-normal law, examples at random.

    Each client gets ``min_size`` examples; the rest is divided by the drawn shares. Complete.
    Source: the quantity skew of Li et al., arXiv:2102.02079, section 4.3.

    Args:
        num_clients: number of clients.
        law: distribution of the shares.
        beta: concentration of the Dirichlet law; the smaller, the more unequal.
        sigma: standard deviation of the logarithm of the size, for the log-normal law; 0 makes all alike.
        min_size: examples that every client has at least.
    """
    n = _check_clients(data, num_clients, min_size, "min_size" if min_size > 1 else "")
    if not (beta > 0 and np.isfinite(beta)):
        raise ValueError(f"beta is {beta}; it must be > 0 and finite")
    if not (sigma >= 0 and np.isfinite(sigma)):
        raise ValueError(f"sigma is {sigma}; it must be >= 0 and finite")
    if min_size < 0:
        raise ValueError(f"min_size is {min_size}; it must be >= 0")
    rng = np.random.default_rng(seed)
    logs = sigma * rng.standard_normal(num_clients)
    shares = rng.dirichlet(np.full(num_clients, beta)) if law == "dirichlet" else np.exp(logs - logs.max())
    sizes = min_size + _cut(shares, n - min_size * num_clients, rng)
    owner = np.empty(n, np.int64)
    owner[rng.permutation(n)] = np.repeat(np.arange(num_clients), sizes)
    return _deal(owner, num_clients)


def _check_clients(data: Dataset, num_clients: int, each: int = 1, option: str = "") -> int:
    """The number of training examples, if there are enough for ``each`` (as ``option`` asks) of the clients."""
    n = len(data.train["y"])
    if num_clients < 1:
        raise ValueError(f"num_clients is {num_clients}; it must be >= 1")
    if num_clients * each > n:
        wants = f" with {each} each ({option})" if option else ""
        raise ValueError(
            f"num_clients is {num_clients}{wants}; {data.name} has {n} training examples, enough for {n // each}"
        )
    return n


def _deal(owner: np.ndarray, num_clients: int, names: tuple[str, ...] = ()) -> Partition:
    """The partition in which example j belongs to client ``owner[j]`` (or to nobody)."""
    order = np.argsort(owner, kind="stable")
    left_out = int((owner == _NOBODY).sum())
    sizes = np.bincount(owner[order[left_out:]], minlength=num_clients)
    return Partition(order[left_out:], np.concatenate([[0], np.cumsum(sizes)]), names)


def _by_counts(y: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An owner per example, such that client i gets ``counts[i, k]`` random examples of class k."""
    owner = np.full(len(y), _NOBODY, np.int64)
    clients = np.arange(len(counts))
    for k in range(counts.shape[1]):
        holders = np.repeat(clients, counts[:, k])
        owner[rng.permutation(np.flatnonzero(y == k))[: len(holders)]] = holders
    return owner


def _cut(shares: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """``total`` things cut at floor(cumsum(shares)·total); all go to one at random if no share has any weight."""
    cumulative = np.cumsum(shares)
    if not 0 < cumulative[-1] < np.inf:
        sizes = np.zeros(len(shares), np.int64)
        sizes[rng.integers(len(shares))] = total
        return sizes
    cuts = np.floor(cumulative / cumulative[-1] * total).astype(np.int64)  # the last cut is exactly `total`
    return np.diff(cuts, prepend=0)


def _dirichlet_counts(
    totals: np.ndarray, num_clients: int, alpha: float, balanced: bool, rng: np.random.Generator
) -> np.ndarray:
    """Examples per client and class, (num_clients, num_classes), of one draw."""
    counts = np.zeros((num_clients, len(totals)), np.int64)
    held = np.zeros(num_clients, np.int64)
    capacity = totals.sum() / num_clients
    for k in np.flatnonzero(totals):
        q = rng.dirichlet(np.full(num_clients, alpha))
        eligible = np.flatnonzero(held < capacity) if balanced else np.arange(num_clients)
        counts[eligible, k] = _cut(q[eligible], int(totals[k]), rng)
        held += counts[:, k]
    return counts


def _fill_empty(counts: np.ndarray) -> None:
    """Move, in place, one example of the largest client's largest class to each client that has none."""
    sizes = counts.sum(axis=1)
    for empty in np.flatnonzero(sizes == 0):
        largest = int(sizes.argmax())
        k = int(counts[largest].argmax())
        counts[largest, k] -= 1
        counts[empty, k] += 1
        sizes[largest] -= 1
        sizes[empty] += 1
