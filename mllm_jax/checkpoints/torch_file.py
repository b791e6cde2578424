"""Read and write files of `torch.save` without torch: tensors, and lists and dicts of tensors.

Such a file is a zip archive of one pickle and of the bytes of every storage. A pickle is a program.
This reader lets it construct tensors and ordered dicts and refuses every other call, so that an
untrusted file is safe to read.
"""

from __future__ import annotations

import collections
import io
import math
import operator
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mllm_jax import files, store
from mllm_jax.checkpoints import archive
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
_NAMES = frozenset(  # dtypes as values of their own; they are read as strings
    "bfloat16 bool float16 float32 float64 int16 int32 int64 int8 uint8".split()  # noqa: SIM905
)
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # the start of files before PyTorch 1.6
_PROGRAM_BYTES = 16 * 2**20  # maximum of a pickle; a tensor of a state_dict takes about 200
_PROGRAM_STEPS = 500_000  # maximum of a pickle; a tensor takes about 30
_SMALL = 2**20  # bytes that an expanded tensor may always have, even in a smaller file
_MAX_AXES = 32  # of a tensor


def read(path: str | pathlib.Path) -> Any:
    """Return the content of a file of `torch.save`.

    Args:
      path: The file.

    Returns:
      A tensor, or lists, tuples and dicts of tensors, numbers and strings. Tensors are read-only
      arrays that are mapped from the file; bfloat16 is the dtype of ml_dtypes.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is truncated, has an unsupported format, or calls anything but tensors.
    """
    return _map(lambda leaf: leaf.read() if isinstance(leaf, Stored) else leaf, index(path))


def index(path: str | pathlib.Path) -> Any:
    """Return the content like `read`, with tensors that are not read yet."""
    path = files.regular(path)
    program, storages = _unzip(path)
    try:
        _check_program(program)
        value = _Tensors(program, path, storages).load()
        return _map(lambda leaf: leaf, value)  # refuses lists that contain themselves
    except _Refused as error:
        call = files.line(error, 100)
        raise ValueError(
            files.refusal(
                path,
                [
                    f"refused, it calls {call} and only tensors are read from a pickle; "
                    "save only its state_dict, or save it as safetensors"
                ],
            )
        ) from error
    except Exception as error:  # a pickle is a program, which can raise anything
        reason = "nested too deeply" if isinstance(error, RecursionError) else files.line(error, 90)
        raise ValueError(files.refusal(path, [f"not a pickle of tensors ({reason})"])) from error


def _unzip(path: pathlib.Path) -> tuple[bytes, dict[str, archive.Member]]:
    """Return the pickle, and the position of the bytes of every storage in the file."""
    try:
        members = {name.partition("/")[2]: m for name, m in archive.members(path).items()}
        if "data.pkl" not in members:
            raise archive.Damaged("it has no data.pkl")
        if members["data.pkl"].size > _PROGRAM_BYTES:
            raise archive.Damaged("its data.pkl is too large")
    except archive.Compressed as error:
        raise ValueError(
            files.refusal(path, ["compressed, as torch.save never does; unpack it first"])
        ) from error
    except archive.Damaged as error:
        raise ValueError(files.refusal(path, [_mend(path, error)])) from error
    order = members.get("byteorder")
    if order and archive.read(path, order) != b"little":
        raise ValueError(files.refusal(path, ["big-endian; only little-endian numbers are read"]))
    storages = {
        name.removeprefix("data/"): member
        for name, member in members.items()
        if name.startswith("data/")
    }
    return archive.read(path, members["data.pkl"]), storages


def _mend(path: pathlib.Path, error: Exception) -> str:
    """Return what is wrong with a file that is not the expected archive, and how to mend it."""
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    if start == _LEGACY:
        return "the format of PyTorch before 1.6; write it again by torch.save of a newer one"
    if start[:1] == b"\x80":
        return "a bare pickle, which is not read; write it by torch.save or as safetensors"
    return f"truncated or altered ({files.line(error, 90)}); fetch it again"


def _check_program(program: bytes) -> None:
    """Refuse a pickle whose value is much larger than the pickle when it is traversed.

    A tuple that contains another one twice, which contains another one twice, takes little memory,
    but hashing or copying it takes exponential time. Each value therefore has a weight, the cost of
    traversing it, and no weight may be much larger than the program.
    """
    stack: list[int | None] = []  # weights; None is a mark
    memo: dict[int, int | None] = {}
    for step, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if step > _PROGRAM_STEPS:
            raise ValueError("too many steps")
        if opcode.name.endswith("PUT"):
            assert argument is not None
            if argument > len(program):
                raise ValueError(
                    "more to remember than it has"
                )  # Python would allocate as many entries
            memo[argument] = stack[-1]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode.name.endswith("GET"):
            assert argument is not None
            stack.append(memo[argument])
        elif opcode.name == "DUP":
            stack.append(stack[-1])
        else:
            weight = 1 + _taken(opcode, stack)
            if weight > 100 * len(program):
                raise ValueError("much larger than its file")
            stack += [None if made.name == "mark" else weight for made in opcode.stack_after]


def _taken(opcode: pickletools.OpcodeInfo, stack: list[int | None]) -> int:
    """Pop the operands of an instruction from the stack, and return the sum of their weights."""
    weight = 0
    for kind in reversed(opcode.stack_before):
        if kind.name == "stackslice":
            while (top := stack[-1]) is not None:
                weight += top
                stack.pop()
        else:
            weight += stack.pop() or 0
    return weight


class _Refused(Exception):
    """A pickle calls a function that is not allowed."""


class _Tensors(pickle.Unpickler):
    """Runs a pickle that may construct tensors and ordered dicts.

    Everything that `find_class` returns is immutable or belongs to this file only, so that a pickle
    cannot change anything but its own value.
    """

    def __init__(self, program: bytes, path: pathlib.Path, storages: dict[str, archive.Member]):
        super().__init__(io.BytesIO(program))
        self._path, self._storages = path, storages
        self._most = max(path.stat().st_size, _SMALL)
        self._allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: self._view(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            ("torch", "Size"): lambda sizes: tuple(map(operator.index, sizes)),
            ("torch", "device"): lambda kind, *number: ":".join(
                [kind, *map("{:d}".format, number)]
            ),
            **{("torch", name): name for name in (*_STORAGES, *_NAMES)},
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Stored:
        _, storage, key, _, count = pid
        dtype, (start, size) = _STORAGES[storage], self._storages[key]
        if not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"storage {key} has {size} bytes, too few for {count} {dtype}")
        return Stored(self._path, key, dtype, (count,), start, (dtype.itemsize,))

    def _view(
        self, storage: Stored, first: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Stored:
        """Return a tensor in its storage; `first` and `strides` are counted in elements."""
        size = storage.dtype.itemsize
        tensor = storage._replace(
            shape=tuple(map(operator.index, shape)),
            offset=storage.offset + operator.index(first) * size,
            strides=tuple(operator.index(stride) * size for stride in strides),
        )
        if len(shape) > _MAX_AXES or len(shape) != len(strides):
            raise ValueError(f"a tensor of {len(shape)} axes and {len(strides)} strides")
        if min(0, first, *shape, *strides) < 0 or tensor.end > storage.end:
            raise ValueError(f"a tensor reaches beyond its storage {storage.key}")
        if math.prod(shape) * size > self._most:
            raise ValueError(f"a tensor of {math.prod(shape):,} elements is larger than its file")
        return tensor


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Return the same lists, tuples and dicts with changed leaves; shared values stay shared.

    Raises:
      ValueError: A list contains itself.
    """
    done: dict[int, Any] = {}
    inside = object()

    def changed(value: Any) -> Any:
        if isinstance(value, Stored) or not isinstance(value, (dict, list, tuple)):
            return change(value)
        if id(value) not in done:
            done[id(value)] = inside
            new: Any
            if isinstance(value, dict):
                new = {key: changed(item) for key, item in value.items()}
            else:
                new = type(value)(changed(item) for item in value)
            done[id(value)] = new
        if done[id(value)] is inside:
            raise ValueError("a list contains itself")
        return done[id(value)]

    return changed(value)


def write(value: Any, path: str | pathlib.Path) -> None:
    """Write arrays as `torch.save` does, for `torch.load(path, weights_only=True)`.

    Equal values give equal bytes.

    Args:
      value: An array, or lists, tuples and dicts of arrays, numbers and strings.
      path: The file, which is written atomically.

    Raises:
      TypeError: A value is not one of these, or has a dtype that torch does not store.
      OSError: The file cannot be written.
    """
    storages: list[np.ndarray] = []
    program = b"\x80\x02" + _encode(value, storages) + pickle.STOP
    with store.atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), program)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for key, array in enumerate(storages):
            archive.writestr(zipfile.ZipInfo(f"archive/data/{key}"), array.data)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def _encode(value: Any, storages: list[np.ndarray]) -> bytes:
    """Return pickle code that pushes a value; its arrays are appended to `storages`."""
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
        return pickle.dumps(value, protocol=2)[2:-1]  # without the protocol and STOP opcodes
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
