"""What bench_retrieve works on: clustered vectors, a metadata list and captions, all drawn by seed."""

import numpy as np


def clustered(count: int, width: int, seed: int, part: int) -> np.ndarray:
    """float16[count, width]: 4,000 clusters of very unequal size, variance falling off as in real embeddings, so that
    neighbourhoods cross cells. `part` draws different points of the same clusters."""
    shape = np.random.default_rng(seed)
    spectrum = (np.arange(1, width + 1) ** -0.6).astype(np.float32)
    centres = shape.standard_normal((4000, width), dtype=np.float32) * spectrum
    weights = (np.arange(1, 4001) ** -0.7).astype(np.float64)
    rng = np.random.default_rng((seed, part))
    out = np.empty((count, width), dtype=np.float16)
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        which = rng.choice(4000, size, p=weights / weights.sum())
        noise = rng.standard_normal((size, width), dtype=np.float32) * spectrum
        out[start : start + size] = centres[which] + 0.6 * noise
    return out


def words(count: int, rng: np.random.Generator) -> list[str]:
    letters, share = np.array(list("etaoinshrdlucmfwypvbgkqjxz")), np.arange(1, 27) ** -0.6
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = rng.choice(letters, (count, 11), p=share / share.sum())
        lengths = rng.integers(2, 11, count)
        found.update(("".join(drawn[i, : lengths[i]]), None) for i in range(count))
    return list(found)[:count]


def metadata_and_captions(n_entries: int, n_captions: int) -> tuple[list[str], list[str]]:
    """Entries in the published proportions (words, bigrams, titles) over a vocabulary with Zipf's frequencies, and
    captions of 3 to 20 words (COYO: 11 words, 68 characters) with punctuation."""
    rng = np.random.default_rng(0)
    vocabulary = words(n_entries, rng)
    share = np.cumsum(np.arange(1, n_entries + 1) ** -1.05)

    def phrase(length: int) -> list[str]:
        return [vocabulary[i] for i in np.searchsorted(share, rng.random(length) * share[-1])]

    # Chosen so that a caption has about as many matches as in the published pool (3.5), or somewhat more.
    found = dict.fromkeys(word for i, word in enumerate(vocabulary) if i % 5 < 2)
    while len(found) < 0.8 * n_entries:
        found.setdefault(" ".join(phrase(2)))
    while len(found) < n_entries:
        found.setdefault(" ".join(phrase(int(rng.integers(2, 6)))).title())
    captions = []
    for i in range(n_captions):
        tokens = phrase(int(rng.integers(3, 20)))
        tokens[len(tokens) // 2] += (",", ".", ":", "!", " -", "")[i % 6]
        caption = " ".join(tokens)
        captions.append(caption.title() if i % 4 == 0 else caption)
    return list(found), captions
