"""Both spectra of a site: one Gram matrix against direct singular value decompositions.

Run by hand, on a quiet machine; OMP_NUM_THREADS sets the threads of torch, numpy and SciPy:

    OMP_NUM_THREADS=2 python benchmarks/spectrum.py [--rows 1000] [--width 2048] [--repeats 7]

Columns: *ours* is ``dsteer.geometry.spectrum.spectra``, uncentred and centred values and both first
right singular vectors. *Peer* is what one writes first, in float64, with torch or with numpy: two
``svdvals`` and a full ``svd`` of the centred matrix. *Limit* is one Gram matrix and one eigvalsh of
order min(N, d), the least that any route through a Gram matrix does; *of limit* is its share of our
time. All are timed in one process, interleaved; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from dsteer.geometry.spectrum import spectra


def matrices(rows: int, width: int) -> dict[str, np.ndarray]:
    """Noise, a shift with noise, a decaying spectrum, and a rank that needs the direct route."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((rows, width))
    shift = rng.standard_normal(width)
    decay = noise * np.arange(1, width + 1) ** -0.5
    return {
        "noise": noise,
        "shift + noise": noise + 2 * shift,
        "shift + 1e-4 noise": 1e-4 * noise + shift,
        "decaying, shifted": decay + 0.3 * shift,
        "rank one (falls back)": np.outer(rng.standard_normal(rows), shift),
    }


def peer_torch(matrix: np.ndarray) -> object:
    """Two svdvals and a centred svd with torch."""
    tensor = torch.from_numpy(matrix)
    centred = tensor - tensor.mean(0)
    return (
        torch.linalg.svdvals(tensor),
        torch.linalg.svdvals(tensor),
        torch.linalg.svd(centred, full_matrices=False),
    )


def peer_numpy(matrix: np.ndarray) -> object:
    """Two svdvals and a centred svd with numpy."""
    centred = matrix - matrix.mean(0)
    return (
        np.linalg.svd(matrix, compute_uv=False),
        np.linalg.svd(matrix, compute_uv=False),
        np.linalg.svd(centred, full_matrices=False),
    )


def limit(matrix: np.ndarray) -> object:
    """One Gram matrix and its eigenvalues."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return np.linalg.eigvalsh(small @ small.T)


def largest_error(matrix: np.ndarray) -> float:
    """Largest distance of a singular value from numpy's, in units of σ₁, over both spectra."""
    errors = []
    centred = (matrix - matrix.mean(0, dtype=np.longdouble)).astype(np.float64)
    for spectrum, target in zip(spectra(matrix), (matrix, centred), strict=True):
        reference = np.linalg.svd(target, compute_uv=False)
        errors.append(np.abs(spectrum.singular_values.numpy() - reference).max() / reference[0])
    return float(max(errors))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    contenders: dict[str, Callable[[np.ndarray], object]] = {
        "ours": spectra,
        "torch": peer_torch,
        "numpy": peer_numpy,
        "limit": limit,
    }
    print(
        f"N = {arguments.rows}, d = {arguments.width}, float64, torch {torch.__version__}, "
        f"numpy {np.__version__}, {torch.get_num_threads()} threads"
    )
    print(
        "| data | ours ms | peer torch ms | peer numpy ms | × torch | × numpy | limit ms "
        "| of limit | max error / σ₁ |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, matrix in matrices(arguments.rows, arguments.width).items():
        times: dict[str, list[float]] = {key: [] for key in contenders}
        for repeat in range(arguments.repeats + 1):
            for key, run in contenders.items():
                start = time.perf_counter()
                run(matrix)
                if repeat:  # the first round warms up
                    times[key].append(1e3 * (time.perf_counter() - start))
        ours, by_torch, by_numpy, least = (statistics.median(times[key]) for key in contenders)
        print(
            f"| {name} | {ours:.0f} | {by_torch:.0f} | {by_numpy:.0f} | {by_torch / ours:.1f} "
            f"| {by_numpy / ours:.1f} | {least:.0f} | {least / ours:.2f} "
            f"| {largest_error(matrix):.1e} |"
        )


if __name__ == "__main__":
    main()
