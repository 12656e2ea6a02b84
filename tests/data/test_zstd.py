"""Zstandard streams: their bytes, in bounded memory however well they compress, and a word where they end too early."""

import io
import struct
import tracemalloc

import pytest
import zstandard

from megatron_joy.data.zstd import open_zstd


def repeated(size: int) -> bytes:
    """A frame of `size` zeros, and a word behind them."""
    compressor = zstandard.ZstdCompressor().compressobj()
    parts = [compressor.compress(bytes(1_000_000)) for _ in range(size // 1_000_000)]
    return b"".join((*parts, compressor.compress(b"end"), compressor.flush()))


def test_a_small_file_that_stands_for_half_a_gigabyte_is_read_in_bounded_memory() -> None:
    frame = repeated(500_000_000)
    assert len(frame) < 30_000
    stream, size, last = open_zstd(io.BytesIO(frame)), 0, b""
    tracemalloc.start()
    while part := stream.read(1 << 20):
        size, last = size + len(part), part
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (size, last[-4:]) == (500_000_003, b"\0end")
    assert peak < 150_000_000


@pytest.mark.parametrize("frames", [1, 3])
def test_frames_one_after_another_are_one_stream(frames: int) -> None:
    parts = [bytes([65 + number]) * 5000 * (number + 1) for number in range(frames)]
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"note"
    content = skippable.join(map(zstandard.ZstdCompressor().compress, parts))
    assert open_zstd(io.BytesIO(content)).read() == b"".join(parts)


def test_every_cut_inside_a_frame_is_noticed() -> None:
    content = zstandard.ZstdCompressor().compress(bytes(range(256)) * 20)
    for cut in range(1, len(content)):
        with pytest.raises((EOFError, zstandard.ZstdError)):
            open_zstd(io.BytesIO(content[:cut])).read()
