"""k-means of 4 million sub-vectors: ours against faiss-cpu and scikit-learn, fit and assignment, with the same threads.

    pip install faiss-cpu scikit-learn
    python reports/bench/kmeans.py

Sub-vectors are 4 consecutive weights of a matrix with heavy tails, all of the same importance, since faiss weighs no coordinates.
Ours and faiss fit a sample, as faiss does by default; scikit-learn's mini-batches see everything. Error: mean squared distance to
the codeword, relative to the vectors' mean square.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "kmeans.jsonl", HERE / "kmeans.md"
COUNT, DIM, CODEWORDS, ITERATIONS, SEEDS = 4 * 2**20, 4, 256, 30, (0, 1, 2)


def vectors() -> torch.Tensor:
    """Return `[COUNT, DIM]` float32: Student's t with 8 degrees of freedom, of the variance 1."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(COUNT * DIM, generator=generator)
    chi = torch.stack([torch.randn(COUNT * DIM, generator=generator).square_() for _ in range(8)]).mean(dim=0)
    found = normal / chi.sqrt()
    return (found / found.std()).reshape(COUNT, DIM)


def ours(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codebook and codes by calibration/kmeans.py."""
    from quantdit.calibration.kmeans import assign, kmeans

    weights = torch.ones_like(x)
    codebook = kmeans(x, weights, CODEWORDS, seed, ITERATIONS)
    return codebook, assign(x, weights, codebook)


def faiss(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codebook and codes by faiss, with as many points to fit as ours takes."""
    import faiss as package

    from quantdit.calibration.kmeans import SAMPLE

    package.omp_set_num_threads(torch.get_num_threads())
    fitted = package.Kmeans(DIM, CODEWORDS, niter=ITERATIONS, seed=seed + 1, max_points_per_centroid=SAMPLE // CODEWORDS)
    fitted.train(x.numpy())
    return torch.from_numpy(fitted.centroids), torch.from_numpy(fitted.index.search(x.numpy(), 1)[1][:, 0])


def scikit_learn(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codebook and codes by scikit-learn's mini-batches."""
    from sklearn.cluster import MiniBatchKMeans

    fitted = MiniBatchKMeans(CODEWORDS, random_state=seed, batch_size=2**14, n_init=1, max_iter=ITERATIONS).fit(x.numpy())
    return torch.from_numpy(fitted.cluster_centers_), torch.from_numpy(fitted.predict(x.numpy())).long()


METHODS = {"quantdit": (ours, "quantdit"), "faiss": (faiss, "faiss-cpu"), "scikit-learn": (scikit_learn, "scikit-learn")}


def measure(method: str, seed: int) -> dict:
    """Return the row of one method and seed."""
    run, package = METHODS[method]
    x = vectors()
    began = time.perf_counter()
    codebook, codes = run(x, seed)
    seconds = time.perf_counter() - began
    error = float((x - codebook[codes]).square().sum(dtype=torch.float64) / x.square().sum(dtype=torch.float64))
    return {
        "method": method,
        "version": version(package),
        "seed": seed,
        "seconds": round(seconds, 2),
        "error": round(error, 5),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> None:
    """Measure each method and seed in a process of its own, and write rows and table."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    rows = []
    for seed in SEEDS:
        for method in METHODS:
            done = subprocess.run([sys.executable, __file__, method, str(seed)], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        f"# k-means of {COUNT:,} sub-vectors of {DIM}, {CODEWORDS} codewords",
        "",
        "Fit and assignment, by `python reports/bench/kmeans.py`; each number over seeds "
        f"{', '.join(map(str, SEEDS))} (least to most). {rows[0]['threads']} threads, {rows[0]['machine']}.",
        "",
        "| | version | seconds | relative error |",
        "|---|---|---|---|",
    ]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        spans = [(min(row[key] for row in own), max(row[key] for row in own)) for key in ("seconds", "error")]
        cells = [f"{low:g} to {high:g}" for low, high in spans]
        lines.append(f"| {method} | {own[0]['version']} | {' | '.join(cells)} |")
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
