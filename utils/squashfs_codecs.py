"""The decompressors a squashfs archive can ask for, each bounded by the size its block may have."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import zlib
from collections.abc import Callable

from utils.errors import InputError

Decompress = Callable[[bytes, int], bytes]

METHODS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
LZMA_MEMORY = 64 << 20  # a block is at most 1 MiB, so is an honest dictionary


def decompressor(method: int) -> Decompress:
    """The function `(data, limit) -> bytes` for a superblock's compression id.

    It returns at most `limit` bytes and raises ValueError when the data is damaged or would give more.

    Raises: InputError when this machine cannot decompress the method.
    """
    name = METHODS.get(method, f"id {method}")
    try:
        if name == "gzip":
            return _gzip
        if name in ("xz", "lzma"):
            return _lzma(name)
        if name == "zstd":
            return _zstd(_library("zstd", "libzstd.so.1"))
        if name == "lz4":
            return _lz4(_library("lz4", "liblz4.so.1"))
    except (ImportError, OSError) as error:
        raise InputError(f"cannot decompress {name}: {error}; install it or repack with gzip") from error
    raise InputError(f"cannot decompress {name}; repack it with mksquashfs -comp gzip")


def _whole(output: bytes, ended: bool, limit: int) -> bytes:
    if not ended or len(output) > limit:
        raise ValueError("compressed block ends early or is too long")
    return output


def _gzip(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        output = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return _whole(output, stream.eof, limit)


def _lzma(name: str) -> Decompress:
    lzma = importlib.import_module("lzma")  # some Pythons are built without it
    container = lzma.FORMAT_XZ if name == "xz" else lzma.FORMAT_ALONE

    def decompress(data: bytes, limit: int) -> bytes:
        stream = lzma.LZMADecompressor(container, memlimit=LZMA_MEMORY)
        try:
            output = stream.decompress(data, limit + 1)
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from error
        return _whole(output, stream.eof, limit)

    return decompress


def _library(name: str, soname: str) -> ctypes.CDLL:
    """The C library itself: `unsquashfs` links it, and it needs no Python package. Raises: OSError."""
    try:
        return ctypes.CDLL(soname)
    except OSError:
        return ctypes.CDLL(ctypes.util.find_library(name) or soname)


def _zstd(library: ctypes.CDLL) -> Decompress:
    call, failed = library.ZSTD_decompress, library.ZSTD_isError
    call.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    call.restype = ctypes.c_size_t
    failed.argtypes = [ctypes.c_size_t]

    def decompress(data: bytes, limit: int) -> bytes:
        buffer = ctypes.create_string_buffer(limit)
        size = call(buffer, limit, data, len(data))
        if failed(size):
            raise ValueError("damaged zstd block")
        return buffer.raw[:size]

    return decompress


def _lz4(library: ctypes.CDLL) -> Decompress:
    call = library.LZ4_decompress_safe
    call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]

    def decompress(data: bytes, limit: int) -> bytes:
        buffer = ctypes.create_string_buffer(limit)
        size = call(data, buffer, len(data), limit)
        if size < 0:
            raise ValueError("damaged lz4 block")
        return buffer.raw[:size]

    return decompress
