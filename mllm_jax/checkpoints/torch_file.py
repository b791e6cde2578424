"""Files of `torch.save`, without torch: tensors, lists and dicts of them, and nothing else.

Such a file is a zip of one pickle and of the bytes of every storage. A pickle is a program; this
reader gives it tensors and ordered dicts to call, and no other function, so it can do no harm.
"""

from __future__ import annotations

import collections
import io
import math
import operator
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mllm_jax import store
from mllm_jax.checkpoints.stored import Stored, row_major

_STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ShortStorage": np.dtype(np.int16),
}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
_NAMES = frozenset(  # dtypes that may stand beside the tensors; they come back as strings
    "bfloat16 bool float16 float32 float64 int16 int32 int64 int8 uint8".split()  # noqa: SIM905
)
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how files began before PyTorch 1.6
_BROKEN = (  # what zipfile raises of a damaged zip
    zipfile.BadZipFile, struct.error, OSError, EOFError, RuntimeError, UnicodeError,
)  # fmt: skip
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the name and of the extra field


def read(path: str | pathlib.Path) -> Any:
    """What a file of `torch.save` holds.

    Args:
        path: the file.

    Returns:
        A tensor, or lists, tuples and dicts of tensors, numbers and strings. Tensors are read-only
        arrays mapped from the file; bfloat16 is that of ml_dtypes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short, of a format that is not read, or asks for anything but tensors.
    """
    try:
        return _map(lambda leaf: leaf.read() if isinstance(leaf, Stored) else leaf, index(path))
    except RecursionError as error:
        raise ValueError(f"{path}: not a pickle of tensors (lists without end)") from error


def index(path: str | pathlib.Path) -> Any:
    """As `read`, with tensors that are not yet read."""
    path = pathlib.Path(path)
    try:
        program, stretches = _unzip(path)
    except FileNotFoundError:
        raise
    except _BROKEN as error:
        raise ValueError(f"{path}: {_mend(path, error)}") from error
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name.endswith("PUT") and argument > len(program):
                raise ValueError("more to remember than it has")  # Python would make room for it
        return _Tensors(program, path, stretches).load()
    except _Refused as error:
        raise ValueError(
            f"{path}: refused, it asks for {_line(error)} and only tensors are read from a pickle; "
            "save its state_dict alone, or as safetensors"
        ) from error
    except Exception as error:  # a pickle can fail in as many ways as a program
        raise ValueError(f"{path}: not a pickle of tensors ({_line(error)})") from error


def _unzip(path: pathlib.Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle, and of every storage where its bytes begin in the file and how many they are."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if "data.pkl" not in entries:
            raise zipfile.BadZipFile("it has no data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError(f"{path}: compressed, as torch.save never does; unpack it first")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError(f"{path}: big-endian, and only little-endian numbers are read")
        stretches = {
            name.removeprefix("data/"): _stretch(entry, file)
            for name, entry in entries.items()
            if name.startswith("data/")
        }
        return archive.read(entries["data.pkl"]), stretches


def _stretch(entry: zipfile.ZipInfo, file: io.BufferedReader) -> tuple[int, int]:
    file.seek(entry.header_offset)
    start = entry.header_offset + 30 + sum(_LOCAL_HEADER.unpack(file.read(30)))
    if start + entry.file_size > file.seek(0, io.SEEK_END):
        raise zipfile.BadZipFile(f"{entry.filename} is cut short")
    return start, entry.file_size


def _mend(path: pathlib.Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    if start == _LEGACY:
        return "the format of PyTorch before 1.6; write it again by torch.save of a newer one"
    if start[:1] == b"\x80":
        return "a bare pickle, which is not read; write it by torch.save or as safetensors"
    return f"truncated or altered ({_line(error)}); fetch it again"


def _line(error: Exception) -> str:
    """What an error says, in one short line even where a hostile file has written it."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())[:200]


class _Refused(Exception):
    """What a pickle asks for and does not get."""


class _Tensors(pickle.Unpickler):
    """Runs a pickle that may call for tensors and ordered dicts.

    Whatever `find_class` gives is immutable or made for this one file, so that a pickle can change
    nothing outside of its own value.
    """

    def __init__(self, program: bytes, path: pathlib.Path, stretches: dict[str, tuple[int, int]]):
        super().__init__(io.BytesIO(program))
        self._path, self._stretches = path, stretches
        self._allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _view(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            ("torch", "Size"): lambda sizes: tuple(sizes),
            ("torch", "device"): lambda *where: ":".join(map(str, where)),
            **{("torch", name): name for name in (*_STORAGES, *_NAMES)},
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Stored:
        _, storage, key, _, count = pid
        dtype, (start, size) = _STORAGES[storage], self._stretches[key]
        if not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"storage {key} has {size} bytes, too few for {count} {dtype}")
        return Stored(self._path, key, dtype, (count,), start, (dtype.itemsize,))


def _view(storage: Stored, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Stored:
    """A tensor in its storage; `first` and `strides` are counted in elements."""
    size = storage.dtype.itemsize
    tensor = storage._replace(
        shape=tuple(map(operator.index, shape)),
        offset=storage.offset + operator.index(first) * size,
        strides=tuple(operator.index(stride) * size for stride in strides),
    )
    if min(0, first, *shape, *strides) < 0 or tensor.end > storage.end:
        raise ValueError(f"a tensor reaches beyond its storage {storage.key}")
    return tensor


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """The same lists, tuples and dicts with other leaves."""
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, Stored):
        return type(value)(_map(change, item) for item in value)
    return change(value)


def write(value: Any, path: str | pathlib.Path) -> None:
    """Writes arrays as `torch.save` does; `torch.load(path, weights_only=True)` reads them.

    The same value is the same bytes.

    Args:
        value: an array, or lists, tuples and dicts of arrays, numbers and strings.
        path: the file; it appears whole or not at all.

    Raises:
        TypeError: a value that is none of these, or of a dtype that torch storages do not have.
        OSError: the file cannot be written.
    """
    storages: list[np.ndarray] = []
    program = b"\x80\x02" + _encode(value, storages) + pickle.STOP
    with store.atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), program)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for key, array in enumerate(storages):
            archive.writestr(zipfile.ZipInfo(f"archive/data/{key}"), array)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def _encode(value: Any, storages: list[np.ndarray]) -> bytes:
    """The part of a pickle that puts a value on the stack; its arrays are added to `storages`."""
    if isinstance(value, dict):
        items = (part for pair in value.items() for part in pair)
        inside = b"".join(_encode(part, storages) for part in items)
        return pickle.EMPTY_DICT + pickle.MARK + inside + pickle.SETITEMS
    if isinstance(value, (list, tuple)):
        inside = pickle.MARK + b"".join(_encode(part, storages) for part in value)
        is_list = isinstance(value, list)
        return pickle.EMPTY_LIST + inside + pickle.APPENDS if is_list else inside + pickle.TUPLE
    if hasattr(value, "dtype"):
        return _encode_tensor(np.asarray(value), storages)
    if value is None or isinstance(value, (bool, int, float, str)):
        return pickle.dumps(value, protocol=2)[2:-1]  # without the mark of a protocol and the stop
    raise TypeError(f"torch files hold arrays, numbers and strings, not {type(value).__name__}")


def _encode_tensor(array: np.ndarray, storages: list[np.ndarray]) -> bytes:
    if array.dtype not in _STORAGE_OF:
        known = ", ".join(sorted(dtype.name for dtype in _STORAGE_OF))
        raise TypeError(f"torch files hold {known}, not {array.dtype}")
    key, strides = str(len(storages)), row_major(array.shape, np.dtype(np.uint8))
    storages.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def plain(part: Any) -> bytes:
        return _encode(part, storages)

    def name(module: str, function: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{function}\n".encode()

    storage = (
        pickle.MARK + plain("storage") + name("torch", _STORAGE_OF[array.dtype])
        + plain(key) + plain("cpu") + plain(math.prod(array.shape))
        + pickle.TUPLE + pickle.BINPERSID
    )  # fmt: skip
    return (
        name("torch._utils", "_rebuild_tensor_v2") + pickle.MARK
        + storage + plain(0) + plain(array.shape) + plain(strides) + plain(False)
        + name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE  # no hooks
        + pickle.TUPLE + pickle.REDUCE
    )  # fmt: skip
