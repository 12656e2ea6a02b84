"""Colours of expert load: a code per load ratio (1 = the expert's fair share) and the palette that draws it.

Code 0 is a dead expert (drawn black). Codes 1 to 255 are log2 of the ratio from a quarter (deep blue) over the fair
share (pale) to four times (deep red): a diverging scale that people who don't see red against green can read.
"""

import numpy as np
from numpy.typing import NDArray

OCTAVES = 2.0
DEAD_RATIO = 0.01
OVERLOADED_RATIO = 2.0
# Anchors of the scale at equal distances, from RdBu of ColorBrewer (Brewer 2003), reversed: colour-blind safe.
_ANCHORS = ("#053061", "#2166ac", "#4393c3", "#92c5de", "#f3f1ee", "#f4a582", "#d6604d", "#b2182b", "#67001f")


def palette() -> NDArray[np.uint8]:
    """The 256 colours, [256, 3] uint8 RGB; no two of codes 1 to 255 are the same, so a colour gives its code back."""
    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _ANCHORS], float)
    place = np.linspace(0, len(anchors) - 1, 255)
    colours = [np.interp(place, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    scale = np.rint(np.stack(colours, axis=1)).astype(np.uint8)
    return np.concatenate([np.zeros((1, 3), np.uint8), scale])


def encode(ratio: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Codes of load ratios of any shape; a missing one (NaN) is drawn as the fair share."""
    safe = np.nan_to_num(np.asarray(ratio, float), nan=1.0)
    octave = np.log2(np.maximum(safe, 1e-9)).clip(-OCTAVES, OCTAVES)
    codes = np.rint(1 + 254 * (octave + OCTAVES) / (2 * OCTAVES)).astype(np.uint8)
    return np.where(safe < DEAD_RATIO, np.uint8(0), codes)


def decode(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Ratios of codes, within 1 % inside the scale; 0 for a dead expert."""
    ratio = 2.0 ** ((codes.astype(float) - 1) / 254 * 2 * OCTAVES - OCTAVES)
    return np.where(codes == 0, 0.0, ratio)
