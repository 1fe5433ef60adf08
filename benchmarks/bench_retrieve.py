"""Retrieval, clustering and balancing beside plain FAISS and the naive published loop, on the same work in one run.

    python benchmarks/bench_retrieve.py [--quick] [--threads N] [--device cuda] [--only search,matching,…]

Prints one Markdown table. Floors (exit status 1 when one is missed, not with --quick): search at recall@4 ≥ 0.95 is at
least 10 × as fast as the flat index and not slower than FAISS IVF at equal recall; matching at least 1,000 × the naive
loop and 100,000 captions a second and core, and equal to Aho-Corasick on all captions. Both sides use the same threads;
on a machine that others use, threads that wait for each other distort the ratio, and --threads 1 is the honest setting.
Peak memory of the sampling is only its own when it runs alone (--only sampling). About 15 minutes on a quiet core.
"""

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="a twentieth of the work, no floors")
parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
parser.add_argument("--device", default="cpu", help="cpu or cuda")
parser.add_argument("--only", default="search,matching,hierarchy,sampling,plan")
ARGS = parser.parse_args() if __name__ == "__main__" else parser.parse_args([])
os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)

import ahocorasick_rs
import faiss
import numpy as np
import torch

from benchmarks.retrieve_data import clustered, metadata_and_captions
from curate.balance.metaclip import Matcher
from curate.retrieve import cells, hierarchy, levels, partition, search
from curate.retrieve.levels import Centroids, KMeans
from curate.store import Store
from curate.vectors import CENTRE_BYTES, POINT_BYTES, get_arrays, points_within, put_arrays

ROWS: list[tuple[str, str, str]] = []
MISSED: list[str] = []
RATES: dict[str, float] = {}


def row(what: str, figure: str, remark: str = "") -> None:
    ROWS.append((what, figure, remark))
    print(f"| {what} | {figure} | {remark} |", flush=True)


def floor(name: str, holds: bool) -> None:
    if not holds and not ARGS.quick:
        MISSED.append(name)


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall seconds, CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if ARGS.device != "cpu":
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def bench_search() -> None:
    count, queries, n_cells = (50_000, 1000, 256) if ARGS.quick else (1_000_000, 10_000, 1024)
    pool, seeds, rows = clustered(count, 256, 1, 0), clustered(queries, 256, 1, 1), np.arange(count)
    print(f"search: {count:,} x 256, {queries:,} queries, k = 4, {n_cells} cells")
    draw = np.random.default_rng(0).choice(count, min(count, 48 * n_cells), replace=False)
    trained, wall, cpu = timed(lambda: cells.train(pool[draw], n_cells, "cosine", iterations=10, device=ARGS.device))
    row(f"train {n_cells} cells on {len(draw):,}", f"{wall:.1f} s", f"CPU {cpu:.1f} s")
    blocks = (pool[start : start + 50_000] for start in range(0, count, 50_000))
    parts, wall, cpu = timed(lambda: list(cells.assign(trained, blocks, ARGS.device)))
    RATES["assign_products"] = count * n_cells * 256 / wall
    limit = product_limit()
    RATES["share"] = 2 * RATES["assign_products"] / limit
    row(
        f"assign {count:,} to {n_cells} cells",
        f"{count / wall:,.0f} vectors/s",
        f"{2 * RATES['assign_products'] / limit:.0%} of this machine's matrix product ({limit / 1e9:.0f} GFLOP/s)",
    )
    members = np.concatenate([part[0] for part in parts])
    held = list(search.by_cell(members, rows, pool))
    watched = search.watched(seeds, 1000, seed=0)
    truth = search.exact(seeds[watched], held, 4, ARGS.device)
    units, unit_seeds = cells.unit(pool), cells.unit(seeds)
    few = unit_seeds[:: max(1, queries // 1000)]
    flat_rate = len(few) / seconds_of_flat(units, few)
    row("FAISS flat", f"{flat_rate:,.0f} queries/s", f"recall 1; {len(few)} queries timed")
    quantizer, pq_quantizer = flat_index(trained.centroids), flat_index(trained.centroids)
    ivf = faiss.IndexIVFFlat(quantizer, 256, n_cells, faiss.METRIC_INNER_PRODUCT)
    ivf.add(units)
    ivfpq = faiss.IndexIVFPQ(pq_quantizer, 256, n_cells, 64, 8, faiss.METRIC_INNER_PRODUCT)
    ivfpq.train(units[draw])
    ivfpq.add(units)
    for probes in (2, 4, 8, 16, 32, 64):

        def ours(probes: int = probes) -> search.Neighbours:
            return search.search(seeds, cells.nearest(trained, seeds, probes, ARGS.device), held, 4, ARGS.device)

        found, wall, cpu = min((timed(ours) for _ in range(2)), key=lambda run: run[1])
        ivf.nprobe = ivfpq.nprobe = probes
        (_, ids), ivf_wall, ivf_cpu = min(
            (timed(lambda: ivf.search(unit_seeds, 4)) for _ in range(2)), key=lambda r: r[1]
        )
        recall, ivf_recall = of(found.rows[watched], truth), of(ids[watched], truth)
        (_, ids), pq_wall, _ = timed(lambda: ivfpq.search(unit_seeds, 4))
        row(
            f"ours, nprobe {probes}",
            f"{queries / wall:,.0f} queries/s",
            f"recall@4 {recall:.3f}; {queries / wall / flat_rate:.0f} x flat; {ivf_wall / wall:.1f} x FAISS IVF "
            f"({queries / ivf_wall:,.0f} queries/s, recall {ivf_recall:.3f}); IVF-PQ64 {queries / pq_wall:,.0f} "
            f"queries/s, recall {of(ids[watched], truth):.3f}; CPU {cpu:.1f} s against {ivf_cpu:.1f} s",
        )
        if recall >= 0.95:
            floor("search: 10 x flat at recall 0.95", queries / wall >= 10 * flat_rate)
            floor("search: not slower than FAISS IVF", wall <= ivf_wall)
            break
    else:
        floor("search: recall 0.95", False)
    bench_codes(pool, seeds, trained, members, truth)


def flat_index(vectors: np.ndarray) -> Any:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def seconds_of_flat(units: np.ndarray, seeds: np.ndarray) -> float:
    """The better of two runs of FAISS's exact search, its index built before and freed afterwards."""
    index = flat_index(units)
    return min(timed(lambda: index.search(seeds, 4))[1] for _ in range(2))


def of(ids: np.ndarray, truth: search.Neighbours) -> float:
    return search.recall(search.Neighbours(ids, truth.similarity), truth)


def product_limit() -> float:
    """FLOP/s of a large float32 product on this machine with these threads."""
    left, right = torch.randn(2048, 2048, device=ARGS.device), torch.randn(2048, 2048, device=ARGS.device)
    out = left @ right
    _, wall, _ = timed(lambda: [torch.mm(left, right, out=out) for _ in range(20)])
    return 20 * 2 * 2048**3 / wall


def spaced(caption: str) -> str:
    text = f" {caption} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    return text.replace("\t", " ").replace("\n", " ").replace("\r", " ")


def bench_matching() -> None:
    n_entries, n_captions = (50_000, 10_000) if ARGS.quick else (500_000, 100_000)
    entries, captions = metadata_and_captions(n_entries, n_captions)
    matcher, wall, _ = timed(lambda: Matcher(entries))
    row(f"build the matcher of {n_entries:,} entries", f"{wall:.1f} s")
    found, wall, cpu = min((timed(lambda: matcher.matches(captions)) for _ in range(3)), key=lambda run: run[2])
    few = captions[:20]

    def naive() -> list[tuple[int, int]]:
        return [
            (i, j)
            for i, text in enumerate(map(spaced, few))
            for j, entry in enumerate(entries)
            if " " + entry + " " in text
        ]

    expected, loop_wall, _ = timed(naive)
    same = [tuple(pair) for pair in found[found[:, 0] < len(few)].tolist()] == expected
    automaton = ahocorasick_rs.BytesAhoCorasick(
        [f" {entry} ".encode() for entry in entries], implementation=ahocorasick_rs.Implementation.ContiguousNFA
    )

    def by_automaton() -> np.ndarray:
        hits = [automaton.find_matches_as_indexes(spaced(text).encode(), overlapping=True) for text in captions]
        pairs = [(i, hit[0]) for i, found in enumerate(hits) for hit in found]
        return np.unique(np.array(pairs), axis=0)

    whole, _, other_cpu = timed(by_automaton)
    same = same and np.array_equal(whole, found)
    row(
        "the same by Aho-Corasick alone",
        f"{n_captions / other_cpu:,.0f} captions/s a core",
        "spacing and pairs included",
    )
    rate, ratio = n_captions / cpu, (n_captions / wall) / (len(few) / loop_wall)
    row(
        f"match {n_captions:,} captions (mean {np.mean([len(c) for c in captions]):.0f} characters)",
        f"{rate:,.0f} captions/s a core",
        f"{len(found) / n_captions:.1f} matches a caption; {ratio:,.0f} x the naive loop; same pairs on all: {same}",
    )
    floor("matching: same pairs", same)
    floor("matching: 1,000 x the naive loop", ratio >= 1000)
    floor("matching: 100,000 captions/s a core", rate >= 100_000)


def bench_hierarchy() -> None:
    """As the step does it: points in files, k-means and passes as items of a map, here of one process."""
    count, sizes = (25_000, (250, 50, 10)) if ARGS.quick else (500_000, (5000, 500, 50))
    points = clustered(count, 64, 2, 0).astype(np.float32)
    with TemporaryDirectory() as folder:
        store = Store(folder)
        put_arrays(store, "points.npz", centroids=points)
        below, wall, cpu = Centroids(store, 64, (("points.npz", count),)), 0.0, 0.0
        for number, size in enumerate(sizes):
            resampling = 2 if number else 0
            how = KMeans(size, "l2", "kmeans++", 20, 50, number, resampling, 5)
            path = f"level{number}/centroids.npz"

            def level(
                below: Centroids = below, how: KMeans = how, path: str = path, work: str = f"level{number}"
            ) -> np.ndarray:
                levels.train(below, how, path, work, map)
                return levels.members(below, path, work, map)

            members, level_wall, level_cpu = timed(level)
            wall, cpu = wall + level_wall, cpu + level_cpu
            remark = f"CPU {level_cpu:.0f} s, 20 iterations, {resampling} resamplings"
            row(f"level {number + 1}: {size} clusters of {below.starts[-1]:,} points", f"{level_wall:.0f} s", remark)
            if number == 0:
                ours = spread_of(points, get_arrays(store, path)["centroids"], members)
            below = Centroids(store, 64, ((path, size),))
    row(f"hierarchical k-means {count:,} x 64, {list(sizes)}", f"{wall:.0f} s", f"CPU {cpu:.0f} s")
    plain = faiss.Kmeans(64, sizes[0], niter=20, seed=1, max_points_per_centroid=50)
    _, plain_wall, plain_cpu = timed(lambda: plain.train(points))
    members = next(cells.assign(cells.Cells(plain.centroids, "l2"), [points]))[0]
    row(
        "its level 1 beside faiss.Kmeans (random start, same sample size)",
        f"{ours / spread_of(points, plain.centroids, members):.3f} of its mean squared distance",
        f"faiss.Kmeans alone {plain_wall:.0f} s, CPU {plain_cpu:.0f} s",
    )


def spread_of(points: np.ndarray, centroids: np.ndarray, members: np.ndarray) -> float:
    """Mean squared distance of points to their centroids."""
    total = 0.0
    for start in range(0, len(points), 50_000):
        part = slice(start, start + 50_000)
        total += float(((points[part] - centroids[members[part]]).astype(np.float64) ** 2).sum())
    return total / len(points)


def bench_sampling() -> None:
    leaves = 500_000 if ARGS.quick else 10_000_000
    rng = np.random.default_rng(3)
    sizes = rng.zipf(1.6, leaves).clip(max=10_000).astype(np.int64)
    parents, above = [], leaves
    for width in (leaves // 20, leaves // 200, leaves // 1000):
        parents.append(np.concatenate([np.arange(width), rng.integers(0, width, above - width)]).astype(np.int32))
        above = width
    tree = hierarchy.Tree(sizes, tuple(parents))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    given, wall, cpu = timed(lambda: hierarchy.allocate(tree, 2 * leaves, seed=0))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    row(
        f"quotas of a tree of {leaves:,} leaves, {int(sizes.sum()):,} images, target {2 * leaves:,}",
        f"{wall:.1f} s",
        f"CPU {cpu:.1f} s; peak memory grew by {grown:,.0f} MB; sum exact: {int(given.sum()) == 2 * leaves}",
    )

    def blocks() -> Iterator[tuple[Any, ...]]:
        for start in range(0, leaves, 1 << 20):  # one image a leaf is enough to time the draw
            ids = np.arange(start, min(start + (1 << 20), leaves))
            yield ids, ids, (ids % 97).astype(np.float32), ids.astype(np.uint64)

    (rows, _), wall, _ = timed(
        lambda: hierarchy.balanced(np.minimum(given, 1), np.ones(leaves, np.int64), blocks(), "random")
    )
    row(f"draw from {leaves:,} images in blocks", f"{leaves / wall:,.0f} images/s", f"{len(rows):,} drawn")


def bench_codes(pool: np.ndarray, seeds: np.ndarray, trained: cells.Cells, members: np.ndarray, truth: Any) -> None:
    """Codes instead of float16, 16 probes, 8 x 4 candidates compared exactly afterwards."""
    watched = search.watched(seeds, 1000, seed=0)
    probes = cells.nearest(trained, seeds, 16, ARGS.device)
    rows = np.arange(len(pool))
    for codec in ("SQ8", "PQ64"):
        codes = search.Codes.trained(pool[: 1 << 12 if ARGS.quick else 1 << 16], codec)
        packed, encode_wall, _ = timed(lambda codes=codes: codes.encode(pool))
        held = list(search.by_cell(members, rows, packed))

        def ours(codes: search.Codes = codes, held: list[Any] = held) -> search.Neighbours:
            blocks = ((cell, some, codes.decode(held)) for cell, some, held in held)
            found = search.search(seeds, probes, blocks, 32, ARGS.device)
            return search.reranked(seeds, found, lambda some: pool[some], 4)

        found, wall, _ = timed(ours)
        recall = of(found.rows[watched], truth)
        figure = f"{len(seeds) / wall:,.0f} queries/s, recall@4 {recall:.3f}"
        row(
            f"{codec}: {packed.shape[1]} bytes a vector, not {2 * pool.shape[1]}",
            figure,
            f"encoded in {encode_wall:.0f} s",
        )


# What an NVIDIA H100 computes in float32 by its data sheet (TF32 off) and the share of a matrix product that the
# assignment reached where it was measured: no GPU was at hand, so hours of a GPU are a calculation.
GPU_FLOPS = 67e12
V100_FLOPS = 15.7e12  # the same of LVD-142M's GPUs


def bench_plan() -> None:
    """A billion vectors at 1,024 dimensions, 100,000 cells, from the measured rate of products; LVD-142M's numbers."""
    if "assign_products" not in RATES:
        row("1-billion plan", "not printed", "it needs the rates of `search`")
        return
    count, width, n_cells, seeds, k = 1_000_000_000, 1024, 100_000, 17_058_723, 4
    where = f"{ARGS.threads} threads, {ARGS.device}"
    row(
        "1-billion plan: storage",
        f"{count * width * 2 / 1e12:.1f} TB float16",
        "twice while parts are dealt; 64 GB as PQ64",
    )
    row(
        "1-billion plan: cells",
        f"{n_cells:,} of {count // n_cells:,}",
        f"{count // n_cells * width * 2 / 1e6:.0f} MB each",
    )
    centroids, part = n_cells * width * 4 / 1e9, 2 * partition.PART_BYTES / 1e9
    row(
        "1-billion plan: memory a worker", f"{centroids + part:.1f} GB", f"centroids {centroids:.1f}, a part {part:.1f}"
    )
    seen = points_within(n_cells, 256, width, 32.0, "plan")
    for points, wanted in ((256, "as asked for"), (seen, "as memory_gb 32, the default, lets it see")):
        bytes_used = n_cells * width * (CENTRE_BYTES + points * POINT_BYTES)
        row("1-billion plan: memory of k-means", f"{bytes_used / 1e9:.0f} GB", f"{points} points a cell, {wanted}")
    sample = n_cells * 256
    works = {
        "k-means, 20 iterations": sample * n_cells * width * 20,
        "assignment": count * n_cells * width,
        f"{seeds:,} seeds, cells to probe": seeds * n_cells * width,
        f"{seeds:,} seeds, nprobe 32, k = {k}": seeds * 32 * (count // n_cells) * width,
    }
    for name, products in works.items():
        here = products / RATES["assign_products"] / 3600
        gpu = 2 * products / (RATES["share"] * GPU_FLOPS) / 3600
        remark = f"{gpu:,.1f} H100-hours: calculated from products alone, not measured"
        if ARGS.device != "cpu":
            remark = "measured rate of this GPU"
        row(f"1-billion plan: {name}", f"{here:,.0f} hours of this machine ({where})", remark)
    flops = 2 * sum(works.values()) / RATES["share"]
    row(
        "1-billion plan: all",
        f"{flops / GPU_FLOPS / 3600:,.0f} H100-hours or {flops / V100_FLOPS / 3600:,.0f} V100-hours of products",
        "calculated; reading and copies not counted; LVD-142M: 20 nodes x 8 V100 x < 2 days = < 7,680 V100-hours, its "
        "deduplication included",
    )


if __name__ == "__main__":
    faiss.omp_set_num_threads(ARGS.threads)
    torch.set_num_threads(ARGS.threads)
    device = torch.cuda.get_device_name() if ARGS.device != "cpu" else platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in cpu_info if "model name" in line), device)
    print(f"machine: {model}, {os.cpu_count()} cores, {ARGS.threads} threads, device {ARGS.device}")
    print(f"load at the start {os.getloadavg()[0]:.1f}")
    print("| what | figure | remark |\n|---|---|---|")
    for name in ARGS.only.split(","):
        {
            "search": bench_search,
            "matching": bench_matching,
            "hierarchy": bench_hierarchy,
            "sampling": bench_sampling,
        }.get(name, bench_plan)()
    print(f"\nload at the end {os.getloadavg()[0]:.1f}; missed floors: {MISSED or 'none'}")
    sys.exit(bool(MISSED))
