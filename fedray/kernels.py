"""One pass over memory where PyTorch and numpy need one for each operation: a few lines of C, for sums of updates.

They are compiled, once a user, where there is a C compiler. Without one, or for what they are not made for, callers do
the same with PyTorch and numpy, with the same bits.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

AddRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor], None]

_SOURCE = r"""
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("default", "avx2", "avx512f")))  /* the processor's own, chosen when it is loaded */
#endif
void add_rows(const float *restrict rows, const double *restrict scales, const int64_t *restrict times, double lift,
              int64_t *restrict total, int64_t num_rows, int64_t length, int64_t stride)
{
    const int64_t block = 4096;  /* a part of the total stays in the cache while all rows are added to it */
    for (int64_t start = 0; start < length; start += block) {
        const int64_t stop = start + block < length ? start + block : length;
        for (int64_t r = 0; r < num_rows; r++) {
            const float *row = rows + r * stride;
            const double scale = scales[r];
            const int64_t weight = times[r];
            for (int64_t k = start; k < stop; k++) {
                const double lifted = row[k] * scale + lift;
                int64_t bits;
                memcpy(&bits, &lifted, sizeof bits);
                total[k] += bits * weight;
            }
        }
    }
}
"""
# without contraction: multiplying and adding in one would round once instead of twice
_FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fwrapv", "-shared", "-fPIC")


@cache
def add_rows() -> AddRows | None:
    """A function that adds rows to a vector in fixed point, or None where it cannot be compiled.

    ``add(rows, scales, times, lift, total)`` is ``total += times[r] * bits(rows[r] * scales[r] + lift)`` for every row
    r, where ``bits`` are those of a float64, read as a whole number. Rows are float32 (r, n), scales float64 (r,),
    times int64 (r,), the total int64 (n,), all on the CPU; gaps may be between rows only.
    """
    library = _library()
    if library is None:
        return None
    function = library.add_rows
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, pointer, ctypes.c_double, pointer, whole, whole, whole]
    function.restype = None

    def add(rows: torch.Tensor, scales: torch.Tensor, times: torch.Tensor, lift: float, total: torch.Tensor) -> None:
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        addresses = (tensor.data_ptr() for tensor in (rows, scales, times))
        function(*addresses, lift, total.data_ptr(), *rows.shape, rows.stride(0))

    return add


def _library() -> ctypes.CDLL | None:
    """The compiled file, which is kept in the user's cache."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    made_of = "\n".join([_SOURCE, *_FLAGS, compiler, platform.platform()])
    folder = Path("~/.cache/fedray/kernels").expanduser()
    library = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                source, made = Path(place, "kernels.c"), Path(place, "kernels.so")
                source.write_text(_SOURCE)
                subprocess.run([compiler, *_FLAGS, source, "-o", made], check=True, capture_output=True, timeout=60)
                made.replace(library)  # whole, whoever else makes it at the same time
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):  # no place to write to or to run from, or another kind of compiler
        return None
