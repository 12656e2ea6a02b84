"""A palette PNG from a small matrix of codes: pictures for the report and TensorBoard without an imaging library."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def palette_png(codes: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """Encodes an indexed-colour PNG (ISO/IEC 15948).

    Args:
        codes: [height, width] uint8, row 0 on top.
        palette: [256, 3] uint8 RGB; code c is drawn in palette[c].
    """
    height, width = codes.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    # Filter 0 on every row: neighbouring loads are noise to each other, so no filter compresses better.
    rows = np.zeros((height, width + 1), np.uint8)
    rows[:, 1:] = codes
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", palette.astype(np.uint8).tobytes()),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )
