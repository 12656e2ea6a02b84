"""Zstandard streams that say so when they are cut short; the library's own reader then just ends."""

import io
from typing import Any, BinaryIO, cast

import zstandard

# Compressed bytes that are handed over at a time. A run of one byte takes four for each 128 kB of it: more at a time
# would let a small file ask for gigabytes at once.
SLICE = 1 << 11


class WholeFrames(io.RawIOBase):
    """Frames, decompressed one after another. Reading raises EOFError where the last one ends too early."""

    def __init__(self, raw: BinaryIO, dictionary: zstandard.ZstdCompressionDict | None = None) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)
        self._frame = self._decompressor.decompressobj()
        self._begun = False
        self._pending = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            chunk = self._pending or self._raw.read(SLICE)
            if not chunk:
                if self._begun:
                    raise EOFError("the last frame is cut short")
                return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(chunk))
            self._pending = self._frame.unused_data if self._frame.eof else b""
            self._begun = not self._frame.eof
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


def open_zstd(raw: BinaryIO, dictionary: zstandard.ZstdCompressionDict | None = None) -> BinaryIO:
    """The decompressed stream of an open file; reading raises EOFError or zstandard.ZstdError where it is broken.

    dictionary: of frames that were compressed with one.
    """
    return cast(BinaryIO, io.BufferedReader(WholeFrames(raw, dictionary), 1 << 20))
