"""Time, memory and recall of the dedup kernels, peers beside them on the same work, in one run.

    python benchmarks/bench_dedup.py --quick            # two minutes: sizes divided by 20
    python benchmarks/bench_dedup.py --only hashes      # 10 M hashes, growth, crowds, refresh, peers: about 15 minutes
    python benchmarks/bench_dedup.py --only vectors     # 1 M vectors, growth, crowds, refresh, peers: about 25 minutes

`--imagededup-python PATH` names the Python of another environment in which imagededup is installed (it pins other
packages than ours); without it that peer is left out. A peer is tried at growing sizes and given up at the first that
takes longer than `--limit` seconds; the ratio is of the largest that it finished.

Floors (2 cores): 10 M hashes with planted pairs, radius 3, in 60 s and 4 GB; 1 M x 512 float16 at cosine 0.9 in
300 s with recall >= 0.99; growth exponents <= 1.15 and <= 1.3. Each measurement runs in a process of its own, so that
its peak memory is its own; making the data is not timed.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HASH_RADIUS, COSINE = 3, 0.9
PLANTED = 0.02  # share of rows that are near-copies


def make_hashes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """pHash-like values: top bit 1, exactly 32 bits set; planted pairs at distance 2 or less, popcount kept."""
    draw = np.random.default_rng(0)
    hashes = np.empty(n, np.uint64)
    for start in range(0, n, 1 << 17):
        values = draw.random((min(1 << 17, n - start), 63), dtype=np.float32)
        bits = np.ones((len(values), 64), np.uint8)
        bits[:, 1:] = values <= np.partition(values, 30, axis=1)[:, 30:31]
        hashes[start : start + len(values)] = np.packbits(bits, axis=1).view(">u8").ravel()
    count = int(n * PLANTED)
    copies = draw.permutation(n)[: 2 * count].reshape(2, -1)
    flips = np.uint64(1) << draw.integers(0, 63, (2, count)).astype(np.uint64)
    hashes[copies[1]] = hashes[copies[0]] ^ flips[0] ^ flips[1]
    return hashes, np.sort(copies.T, axis=1)


def make_vectors(
    n: int, width: int = 512, planted: tuple[float, float] = (0.925, 1.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian float16 vectors (no clusters: the hardest for cells); planted pairs at these cosines, give or take
    0.02 at 0.9."""
    draw = np.random.default_rng(0)
    vectors = np.empty((n, width), np.float16)
    for start in range(0, n, 65536):
        vectors[start : start + 65536] = draw.standard_normal((min(65536, n - start), width), dtype=np.float32)
    count = int(n * PLANTED)
    copies = draw.permutation(n)[: 2 * count].reshape(2, -1)
    cosine = draw.uniform(*planted, (count, 1)).astype(np.float32)
    other = draw.standard_normal((count, width), dtype=np.float32)
    vectors[copies[1]] = cosine * vectors[copies[0]] + np.sqrt(1 - cosine**2) * other
    return vectors, np.sort(copies.T, axis=1)


def make_close_vectors(n: int) -> tuple[np.ndarray, np.ndarray]:
    """As `make_vectors`, with pairs just above the threshold: those that cells miss first."""
    vectors, planted = make_vectors(n, planted=(0.9, 0.92))
    left, right = (vectors[planted[:, side]].astype(np.float64) for side in (0, 1))
    cosine = (left * right).sum(axis=1) / np.sqrt((left * left).sum(axis=1) * (right * right).sum(axis=1))
    return vectors, planted[cosine.astype(np.float32) >= np.float32(COSINE)]


def make_vector_crowd(n: int) -> tuple[np.ndarray, np.ndarray]:
    """As `make_vectors`, but every second vector is that of one image, encoded again and again: cosine 0.99."""
    vectors, planted = make_vectors(n)
    draw = np.random.default_rng(1)
    vectors[::2] = vectors[0] + 0.1 * draw.standard_normal((len(vectors[::2]), vectors.shape[1]), dtype=np.float32)
    return vectors, planted[(planted % 2 == 1).all(axis=1)]


def make_vector_refresh(n: int) -> tuple[np.ndarray, np.ndarray]:
    """As `make_vectors`; of the planted pairs, those with one of the last tenth, which is new."""
    vectors, planted = make_vectors(n)
    return vectors, planted[planted[:, 1] >= n - n // 10]


def make_crowd(n: int) -> tuple[np.ndarray, np.ndarray]:
    """As `make_hashes`, but every second hash is that of one image with up to four bits changed."""
    hashes, planted = make_hashes(n)
    draw, crowd = np.random.default_rng(1), len(hashes[::2])
    bits = np.uint64(1) << np.arange(63, dtype=np.uint64)
    sides = bits[(hashes[0] & bits) != 0], bits[(hashes[0] & bits) == 0]
    values, swaps = np.full(crowd, hashes[0]), draw.integers(0, 3, crowd)
    for swap in range(2):  # popcount stays 32, as in a real pHash
        both = draw.choice(sides[0], crowd) ^ draw.choice(sides[1], crowd)
        values = np.where(swaps > swap, values ^ both, values)
    hashes[::2] = values
    return hashes, planted[(planted % 2 == 1).all(axis=1)]


def make_refresh(n: int) -> tuple[np.ndarray, np.ndarray]:
    """As `make_hashes`; of the planted pairs, those with one of the last tenth, which is new."""
    hashes, planted = make_hashes(n)
    return hashes, planted[planted[:, 1] >= n - n // 10]


def recall_of(found: np.ndarray, planted: np.ndarray, n: int) -> float:
    """Share of the planted pairs that were found."""
    return float(np.isin(planted[:, 0] * n + planted[:, 1], found[:, 0] * n + found[:, 1]).mean())


def ours_hamming(hashes: np.ndarray) -> np.ndarray:
    """curate.dedup.hamming.pairs_within."""
    from curate.dedup.hamming import pairs_within

    return pairs_within(hashes, HASH_RADIUS)


def ours_components(hashes: np.ndarray) -> np.ndarray:
    """curate.dedup.hamming.edges_within: what holds the components together."""
    from curate.dedup.hamming import edges_within

    return edges_within(hashes, HASH_RADIUS)[0]


def ours_refresh(hashes: np.ndarray) -> np.ndarray:
    """The same, when the pairs of all but the last tenth are known."""
    from curate.dedup.hamming import edges_within

    fresh = np.arange(len(hashes)) >= len(hashes) - len(hashes) // 10
    return edges_within(hashes, HASH_RADIUS, fresh=fresh)[0]


def imagededup_hamming(hashes: np.ndarray) -> np.ndarray:
    """imagededup's default (brute force in Cython, all cores), in the Python that has it."""
    from imagededup.methods import PHash

    names = {f"{row:08d}": f"{int(value):016x}" for row, value in enumerate(hashes)}
    found = PHash(verbose=False).find_duplicates(encoding_map=names, max_distance_threshold=HASH_RADIUS)
    pairs = [(int(one), int(other)) for one, others in found.items() for other in others if one < other]
    return np.array(pairs, np.int64).reshape(-1, 2)


def numpy_hamming(hashes: np.ndarray) -> np.ndarray:
    """All with all in numpy: the floor to beat."""
    found = []
    for row in range(len(hashes) - 1):
        near = np.flatnonzero(np.bitwise_count(hashes[row + 1 :] ^ hashes[row]) <= HASH_RADIUS)
        found += [(row, row + 1 + at) for at in near]
    return np.array(found, np.int64).reshape(-1, 2)


def faiss_hamming(hashes: np.ndarray) -> np.ndarray:
    """FAISS IndexBinaryMultiHash, 4 maps of 16 bits (exact for radius 3), range search of all against all."""
    import faiss

    index = faiss.IndexBinaryMultiHash(64, 4, 16)
    codes = hashes.astype("<u8").view(np.uint8).reshape(-1, 8)
    index.add(codes)
    limits, _, other = index.range_search(codes, HASH_RADIUS + 1)
    row = np.repeat(np.arange(len(hashes)), np.diff(limits.astype(np.int64)))
    return np.stack([row, other], axis=1)[row < other]


def ours_cosine(vectors: np.ndarray) -> np.ndarray:
    """curate.dedup.cells: train, assign, then cells side by side with one thread each, as the step's tasks are."""
    import torch

    from curate.dedup import cells as by

    count = max(1, round(len(vectors) * by.PROBES / by.ROWS_PER_CELL))
    centres = by.train_cells(vectors[:: max(1, len(vectors) // (count * by.SAMPLE_PER_CELL))], len(vectors))
    entered, _ = by.assign_cells(vectors, centres)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def of_cell(item: tuple[int, np.ndarray]) -> np.ndarray:
        cell, rows = item
        return rows[by.pairs_in_cell(vectors[rows], entered[rows], cell, COSINE)[0]]

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pairs = np.concatenate([np.empty((0, 2), np.int64), *pool.map(of_cell, by.rows_of_cells(entered))])
    torch.set_num_threads(threads)
    recall = by.measure_recall(vectors, COSINE, pairs, rows=1_024)  # as many as the step takes
    print(f"cells {len(centres)}, recall by its own sample {recall.rate:.4f} (>= {recall.lower:.4f})", file=sys.stderr)
    return pairs


def ours_edges(vectors: np.ndarray) -> np.ndarray:
    """curate.dedup.cosine.edges_above on one block: what holds the components together."""
    from curate.dedup.cosine import edges_above

    return edges_above(vectors, COSINE)[0]


def ours_nearest(vectors: np.ndarray) -> np.ndarray:
    """DINOv2's form on one block: 64 neighbours above 0.6."""
    from curate.dedup.cosine import nearest_above

    return nearest_above(vectors, 0.6, 64)[0]


def ours_nearest_refresh(vectors: np.ndarray) -> np.ndarray:
    """The same, when the neighbours of all but the last tenth are known."""
    from curate.dedup.cosine import nearest_above

    return nearest_above(vectors, 0.6, 64, fresh=np.arange(len(vectors)) >= len(vectors) - len(vectors) // 10)[0]


def faiss_cosine(vectors: np.ndarray) -> np.ndarray:
    """FAISS flat inner product, range search of all against all."""
    import faiss

    unit = vectors.astype(np.float32)
    faiss.normalize_L2(unit)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    limits, _, other = index.range_search(unit, COSINE)
    row = np.repeat(np.arange(len(unit)), np.diff(limits.astype(np.int64)))
    return np.stack([row, other], axis=1)[row < other]


def semdedup(vectors: np.ndarray) -> np.ndarray:
    """SemDeDup as published: one cell a vector (about 1,000 rows each), a cell's full matrix, earlier rows only."""
    import faiss

    unit = vectors.astype(np.float32)
    faiss.normalize_L2(unit)
    means = faiss.Kmeans(unit.shape[1], max(1, len(unit) // 1000), niter=10, seed=1234, spherical=True)
    means.train(unit)
    near, cell = means.index.search(unit, 1)
    found = []
    for number in range(max(1, len(unit) // 1000)):
        rows = np.flatnonzero(cell[:, 0] == number)
        rows = rows[np.argsort(near[rows, 0], kind="stable")]
        matrix = np.triu(unit[rows] @ unit[rows].T, 1)
        if len(rows):
            earlier = matrix.argmax(axis=0)
            gone = np.flatnonzero(matrix.max(axis=0) > COSINE)
            found.append(np.sort(np.stack([rows[earlier[gone]], rows[gone]], axis=1), axis=1))
    return np.concatenate([np.empty((0, 2), np.int64), *found])


TASKS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[int], tuple[np.ndarray, np.ndarray]]]] = {
    "hashes: curate": (ours_hamming, make_hashes),
    "hashes: curate, components": (ours_components, make_hashes),
    "hashes: curate, half nearly one image": (ours_components, make_crowd),
    "hashes: curate, a tenth new": (ours_refresh, make_refresh),
    "hashes: imagededup": (imagededup_hamming, make_hashes),
    "hashes: FAISS IndexBinaryMultiHash": (faiss_hamming, make_hashes),
    "hashes: numpy, all with all": (numpy_hamming, make_hashes),
    "vectors: curate cells": (ours_cosine, make_vectors),
    "vectors: curate cells, pairs at 0.90 to 0.92": (ours_cosine, make_close_vectors),
    "vectors: curate, one block, components": (ours_edges, make_vectors),
    "vectors: curate, one block, half nearly one image": (ours_edges, make_vector_crowd),
    "vectors: curate, one block, DINOv2's form": (ours_nearest, make_vectors),
    "vectors: curate, one block, DINOv2's form, half nearly one image": (ours_nearest, make_vector_crowd),
    "vectors: curate, one block, DINOv2's form, a tenth new": (ours_nearest_refresh, make_vector_refresh),
    "vectors: FAISS flat range search": (faiss_cosine, make_vectors),
    "vectors: SemDeDup as published": (semdedup, make_vectors),
}


def measure_here(task: str, n: int) -> None:
    """Run one measurement in this process and print it as JSON."""
    work, make = TASKS[task]
    data, planted = make(n)
    work(data[:200].copy())  # what is imported and started once is not timed
    wall, cpu = time.perf_counter(), cpu_s()
    found = work(data)
    result = {
        "task": task, "n": n, "wall_s": time.perf_counter() - wall, "cpu_s": cpu_s() - cpu,
        "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "pairs": len(found),
        "recall": recall_of(found, planted, n),
    }  # fmt: skip
    print(json.dumps(result))


def cpu_s() -> float:
    """CPU seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(task: str, n: int, limit_s: float, python: str = sys.executable) -> dict[str, float] | None:
    """Run one measurement in a fresh process; None when it does not finish in time."""
    command = [python, __file__, "--one", task, "--n", str(n)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit_s, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        what = f"> {limit_s:.0f}" if isinstance(error, subprocess.TimeoutExpired) else f"failed: {error.returncode}"
        print(f"| {task} | {n:,} | {what} | | | | |", flush=True)
        return None
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"| {task} | {n:,} | {row['wall_s']:.1f} | {row['cpu_s']:.1f} | {row['rss_gb']:.2f} | {row['pairs']:,} "
        f"| {row['recall']:.4f} |", flush=True,
    )  # fmt: skip
    return row


def exponent(rows: list[dict[str, float] | None], of: str) -> float:
    """Slope of log time over log N."""
    kept = [row for row in rows if row]
    if len(kept) < 2:
        return float("nan")
    return float(np.polyfit(np.log([row["n"] for row in kept]), np.log([row[of] for row in kept]), 1)[0])


def paper_plan(row: dict[str, float]) -> str:
    """What a billion hashes would take, from the plan's own model scaled by the measured rate."""
    from curate.dedup.hamming_tables import plan_tables

    hashes = make_hashes(200_000)[0]
    here, there = (plan_tables(hashes, HASH_RADIUS, n=n) for n in (int(row["n"]), 10**9))
    core_s = there.predicted_ns * row["cpu_s"] / here.predicted_ns
    return (
        f"1,000,000,000 hashes on paper: {len(there.blocks)} blocks, {len(there)} tables, "
        f"{there.predicted_candidates:.2g} candidates, {core_s / 3600:.1f} core-hours, {8 * len(there)} GB of "
        f"hashes through the partitions (16 bytes of id each on top), about 100 bytes a hash in a worker: 4 GB hold "
        f"40 M, so {max(1, 10**9 // 40_000_000)} partitions a table"
    )


def main() -> None:
    """Print the table, the ratios, the exponents and the plan on paper."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes divided by 20")
    parser.add_argument("--only", choices=["hashes", "vectors"], help="half of the benchmark")
    parser.add_argument("--imagededup-python", help="a Python in whose environment imagededup is installed")
    parser.add_argument("--limit", type=float, default=600, help="seconds a measurement may take")
    parser.add_argument("--one", choices=list(TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure_here(options.one, options.n)
        return
    scale = 20 if options.quick else 1
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, numpy {np.__version__}\n")
    print("| task | N | wall s | CPU s | peak GB | pairs | recall of planted |\n|---|---|---|---|---|---|---|")
    notes = []
    for kind, ours, sizes, others, peers in (
        ("hashes", "hashes: curate", (1_000_000, 2_000_000, 4_000_000, 8_000_000), (
            ("hashes: curate, components", 4_000_000), ("hashes: curate, a tenth new", 4_000_000),
            ("hashes: curate, half nearly one image", 1_000_000), ("hashes: curate, half nearly one image", 4_000_000),
        ), {
            "hashes: imagededup": (20_000, 40_000), "hashes: FAISS IndexBinaryMultiHash": (1_000_000, 4_000_000),
            "hashes: numpy, all with all": (100_000,),
        }),
        ("vectors", "vectors: curate cells", (250_000, 500_000, 1_000_000), (
            ("vectors: curate cells, pairs at 0.90 to 0.92", 500_000),
            *((task, 40_000) for task in TASKS if task.startswith("vectors: curate, one block")),
        ), {
            "vectors: FAISS flat range search": (100_000, 200_000),
            "vectors: SemDeDup as published": (250_000, 1_000_000),
        }),
    ):  # fmt: skip
        if options.only not in (None, kind):
            continue
        rows = [measure(ours, n // scale, 2 * options.limit) for n in sizes]
        grows = " and ".join(
            f"{name} as N^{exponent(rows, of):.2f}" for of, name in (("cpu_s", "CPU"), ("wall_s", "wall"))
        )
        notes.append(f"{ours}: time grows: {grows}")
        if kind == "hashes" and (largest := measure(ours, 10_000_000 // scale, options.limit)):
            notes.append(paper_plan(largest))
        for task, n in others:
            measure(task, n // scale, options.limit)
        for peer, tries in peers.items():
            if "imagededup" in peer and not options.imagededup_python:
                continue
            python = options.imagededup_python if "imagededup" in peer else sys.executable
            theirs = None
            for n in tries:
                if not (found := measure(peer, n // scale, options.limit, python)):
                    break
                theirs = found
            if theirs and (same := measure(ours, int(theirs["n"]), options.limit)):
                ratios = [theirs[of] / same[of] for of in ("cpu_s", "wall_s")]
                notes.append(
                    f"{peer}: {ratios[0]:.1f} times the CPU and {ratios[1]:.1f} times the wall time of curate at "
                    f"N = {int(theirs['n']):,}; recall {theirs['recall']:.4f} and {same['recall']:.4f}"
                )
    print("\n" + "\n".join(f"- {note}" for note in notes))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
