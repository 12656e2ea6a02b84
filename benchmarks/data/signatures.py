"""MinHash signatures per CPU second: ours, datasketch, rensa and numpy, in one run on the same documents.

    python -m pip install datasketch rensa xxhash   # the peers; what is missing is left out
    python benchmarks/data/signatures.py [--megabytes 200] [--peer-megabytes 10] [--json]

All make 7-gram word shingles and 128 permutations. The peers get words from Python's regular expressions, as their own
documentation does; ours folds Unicode on top of that. Then the exactness of it all: documents are edited so that their
Jaccard similarity is near 0.8, 0.85, 0.9 and 0.95, and the share of the planted pairs that is found is printed.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.dedup.bands import BANDS, candidate_probability
from data_pipeline.dedup.match import Settings, match_band
from data_pipeline.dedup.minhash import GRAM, PERMUTATIONS, MinHash
from data_pipeline.dedup.store import Store, write_part
from data_pipeline.dedup.verify import distinct_pairs, exact_jaccard

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.corpus import environment_texts

WORDS = re.compile(r"\w+")
TARGETS = (0.8, 0.85, 0.9, 0.95)


def shingles(text: str) -> list[str]:
    """Runs of 7 words, as the peers' users make them."""
    words = WORDS.findall(text.lower())
    return [" ".join(words[i : i + GRAM]) for i in range(max(1, len(words) - GRAM + 1))]


def ours(texts: Sequence[bytes]) -> None:
    """Signatures, and the sets that similarity is computed from, about a megabyte at a time as the pipeline does."""
    method = MinHash()
    for start in range(0, len(texts), 70):
        method.sign(texts[start : start + 70])


def datasketch(texts: Sequence[bytes]) -> None:
    """One MinHash a document, all shingles in one update."""
    from datasketch import MinHash as Peer

    for text in texts:
        Peer(num_perm=PERMUTATIONS, seed=1).update_batch([gram.encode() for gram in set(shingles(text.decode()))])


def rensa(texts: Sequence[bytes]) -> None:
    """One RMinHash a document."""
    from rensa import RMinHash

    for text in texts:
        signer = RMinHash(num_perm=PERMUTATIONS, seed=42)
        signer.update(shingles(text.decode()))
        signer.digest()


CONTENDERS: dict[str, Callable[[Sequence[bytes]], None]] = {"ours": ours, "datasketch": datasketch, "rensa": rensa}


def speeds(megabytes: float, peer_megabytes: float) -> dict[str, float]:
    """MB of text per CPU second (user + system, this process, one thread) of each contender that is installed."""
    texts = list(environment_texts(megabytes))
    small = list(environment_texts(peer_megabytes))
    found = {}
    for name, sign in CONTENDERS.items():
        sample = texts if name == "ours" else small
        try:
            sign(sample[:2])  # imports and tables
        except ImportError:
            continue
        began = time.process_time()
        sign(sample)
        found[name] = sum(map(len, sample)) / 1e6 / (time.process_time() - began)
    return found


def edited(rng: random.Random, text: str, similarity: float) -> str:
    """The text with so many words changed that its shingles have about this Jaccard similarity."""
    parts = re.split(r"(\W+)", text)
    places = [place for place, part in enumerate(parts) if WORDS.fullmatch(part)]
    changes = max(1, round(len(places) * (1 - similarity) / (GRAM * (1 + similarity))))
    for place in rng.sample(places, changes):
        parts[place] = f"zq{rng.randrange(10**6)}"
    return "".join(parts)


def plain_jaccard(one: str, other: str) -> float:
    """Of the sets of shingles that regular expressions give."""
    sets = [set(shingles(text)) for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def quality(documents: int) -> list[dict[str, float]]:
    """Recall of planted pairs by similarity, after bands and exact verification at that similarity."""
    rng = random.Random(3)
    # ASCII: regular expressions end words at the marks of other scripts, ours do not. Beginnings that differ: of a
    # licence that a hundred packages ship each copy is only compared with some (match.py).
    found_texts = (text.decode() for text in environment_texts(60.0) if 1500 < len(text) < 40_000 and text.isascii())
    base = list({text[:200]: text for text in found_texts}.values())[:documents]
    texts, planted = list(base), []
    for target in TARGETS:
        for number, text in enumerate(base):
            texts.append(edited(rng, text, target + rng.uniform(-0.02, 0.02)))
            planted.append((number, len(texts) - 1))
    exact = {pair: plain_jaccard(texts[pair[0]], texts[pair[1]]) for pair in planted}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_part(folder / "part", MinHash(), ((text.encode(), 0.0) for text in texts))
        store, settings = Store([folder / "part"], MinHash(), earlier=0), Settings()
        bands = [np.concatenate(list(match_band(store, band, settings, folder))) for band in range(settings.bands)]
        pairs = np.concatenate(list(distinct_pairs(bands, settings.memory_rows)))
        similarity = exact_jaccard(store, pairs)
    rows = []
    for target in TARGETS:
        found = set(map(tuple, pairs[similarity >= target].tolist()))
        wanted = {pair for pair, value in exact.items() if value >= target}
        right = sum(plain_jaccard(texts[i], texts[j]) >= target for i, j in found)
        rows.append(
            {
                "threshold": target,
                "planted_pairs": len(wanted),
                "recall": len(found & wanted) / len(wanted),
                "precision": right / len(found),
                "found_pairs": len(found),
                "bands_alone_at_threshold": candidate_probability(target, BANDS, PERMUTATIONS // BANDS),
            }
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--peer-megabytes", type=float, default=10.0)
    parser.add_argument("--documents", type=int, default=600, help="originals that pairs are planted for")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found, rows = speeds(options.megabytes, options.peer_megabytes), quality(options.documents)
    if options.json:
        print(json.dumps({"megabytes_per_cpu_second": found, "quality": rows}, indent=2))
        return
    for name, speed in found.items():
        print(f"{name:<12}{speed:>8.2f} MB per CPU second; ours is {found['ours'] / speed:6.1f}x")
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
