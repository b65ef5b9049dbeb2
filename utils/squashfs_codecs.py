"""The decompressors a squashfs archive can ask for, each bounded by the size its block may have."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import threading
import zlib
from collections.abc import Callable

from utils.errors import InputError

Decompress = Callable[[bytes, int], bytes]

METHODS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
LZMA_MEMORY = 64 << 20  # a block is at most 1 MiB, so is an honest dictionary

# Bytes that are written to before anybody else has them: no zeroes first, and no copy after.
_unwritten = ctypes.pythonapi.PyBytes_FromStringAndSize
_unwritten.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]
_unwritten.restype = ctypes.py_object


def decompressor(method: int) -> Decompress:
    """The function `(data, limit) -> bytes` for a superblock's compression id; threads may share it.

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


class _ZstdContext(threading.local):
    """What zstd works in, 150 KB, kept by each thread: to get it anew costs as much as a small block."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._free = library.ZSTD_freeDCtx
        self.pointer = ctypes.c_void_p(library.ZSTD_createDCtx())
        if not self.pointer:
            raise MemoryError("zstd: no memory for a context")

    def __del__(self) -> None:
        self._free(self.pointer)


def _zstd(library: ctypes.CDLL) -> Decompress:
    call, failed = library.ZSTD_decompressDCtx, library.ZSTD_isError
    library.ZSTD_createDCtx.restype = ctypes.c_void_p
    library.ZSTD_freeDCtx.argtypes = [ctypes.c_void_p]
    call.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    call.restype = ctypes.c_size_t
    failed.argtypes = [ctypes.c_size_t]
    context = _ZstdContext(library)

    def decompress(data: bytes, limit: int) -> bytes:
        output = _unwritten(None, limit)
        size = call(context.pointer, output, limit, data, len(data))
        if failed(size):
            raise ValueError("damaged zstd block")
        return output if size == limit else output[:size]

    return decompress


def _lz4(library: ctypes.CDLL) -> Decompress:
    call = library.LZ4_decompress_safe
    call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]

    def decompress(data: bytes, limit: int) -> bytes:
        output = _unwritten(None, limit)
        size = call(data, output, len(data), limit)
        if size < 0:
            raise ValueError("damaged lz4 block")
        return output if size == limit else output[:size]

    return decompress
