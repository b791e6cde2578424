"""Fingerprint the dependencies of a stored result by a short hash of their content.

Arrays are hashed by their bytes, pytrees by leaves and structure, images by pixels, functions by
code. Each part is encoded with its kind and its length, so that no two contents have the same
encoding.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import pathlib
import re
import types
import weakref
from collections.abc import Mapping, Set
from typing import Any

import jax
import numpy as np

from mllm_jax.sharding import mesh

LENGTH = 32  # hexadecimal digits
# Their functions are hashed by name and code, not by what they call.
_LIBRARIES = frozenset(("mllm_jax", "jax", "jaxlib", "flax", "optax", "numpy", "builtins"))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
_FLAGS = 0x3AC  # of code: *args, **kwargs, generator, coroutine
_ARRAYS = (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)
_arrays: dict[int, tuple[weakref.ref, bytes]] = {}  # hashes of arrays that are alive


def fingerprint(*values: Any) -> str:
    """Return a short hash of the content of values: arrays, pytrees, images, text, functions.

    Functions are hashed by bytecode, constants, defaults, closures and the globals that they read,
    not by name. An object can define its own content: the result of its method `_fingerprint_()` is
    hashed instead.

    Args:
      *values: The values. If arrays are sharded over several processes, all of them must call
        this together.

    Returns:
      LENGTH hexadecimal digits.
    """
    return _Encoder().encode(values).hex()[:LENGTH]


def file(path: str | pathlib.Path) -> str:
    """Return the fingerprint of the bytes of a file, or of the names and files of a folder."""
    path = pathlib.Path(path)
    if path.is_dir():
        return fingerprint({str(p.relative_to(path)): file(p) for p in files(path)})
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:LENGTH]


def files(folder: pathlib.Path, pattern: str = "*") -> list[pathlib.Path]:
    """Return the files in and below a folder, sorted."""
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


@functools.cache
def code(*packages: str) -> str:
    """Return the fingerprint of the source code of packages."""
    import importlib.util

    sources = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"no package {package}"
        for folder in spec.submodule_search_locations or ():
            for path in files(pathlib.Path(folder), "*.py"):
                sources[f"{package}/{path.relative_to(folder)}"] = file(path)
    return fingerprint(sources)


class _Encoder:
    """Hash one value; a cycle is encoded by the depth of the object that it returns to."""

    def __init__(self) -> None:
        self._inside: dict[int, int] = {}

    def encode(self, value: Any) -> bytes:
        if type(value) in _PLAIN:
            return _hash(type(value).__name__, repr(value).encode("utf-8", "surrogatepass"))
        if isinstance(value, types.ModuleType):
            return _hash("module", value.__name__.encode())
        if isinstance(value, _ARRAYS):
            return self._array(value)
        if id(value) in self._inside:
            return _hash("inside", str(self._inside[id(value)]).encode())
        self._inside[id(value)] = len(self._inside)
        try:
            return self._composed(value)
        finally:
            del self._inside[id(value)]

    def _composed(self, value: Any) -> bytes:
        if own := getattr(type(value), "_fingerprint_", None):
            return self._all("own", type(value).__qualname__, own(value))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, Mapping):
            pairs = sorted((self.encode(key), self.encode(item)) for key, item in value.items())
            return _hash("mapping", *(part for pair in pairs for part in pair))
        if isinstance(value, Set):
            return _hash("set", *sorted(map(self.encode, value)))
        if isinstance(value, list | tuple):
            return self._all(type(value).__name__, *value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if callable(value) and (found := self._function(value)) is not None:
            return found
        if hasattr(value, "tobytes") and hasattr(value, "getbands"):  # a PIL image
            palette = value.getpalette() if value.mode in ("P", "PA") else None
            return self._all("picture", value.mode, value.size, palette, value.tobytes())
        return self._object(value)

    def _all(self, kind: str, *values: Any) -> bytes:
        return _hash(kind, *map(self.encode, values))

    def _array(self, array: Any) -> bytes:
        if not isinstance(array, jax.Array):
            return self._array_bytes(array)
        kept = _arrays.get(id(array))
        if kept is None or kept[0]() is not array:
            forget = functools.partial(_forget, id(array))
            kept = _arrays[id(array)] = weakref.ref(array, forget), self._array_bytes(array)
        return kept[1]

    def _array_bytes(self, array: Any) -> bytes:
        if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            return self._all("key", str(array.dtype), jax.random.key_data(array))
        if isinstance(array, jax.ShapeDtypeStruct):
            return self._all("shape", str(array.dtype), tuple(array.shape))
        if array.dtype == object:
            return self._all("objects", tuple(array.shape), np.asarray(array).ravel().tolist())
        digest = hashlib.sha256(f"array {array.dtype} {tuple(array.shape)} ".encode())
        for rows in mesh.iterate_rows(array):
            digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        return digest.digest()

    def _function(self, value: Any) -> bytes | None:
        """Hash a function; return None for other callable objects."""
        if isinstance(value, functools.partial):  # and jax.tree_util.Partial
            return self._all("partial", value.func, value.args, value.keywords)
        if isinstance(value, types.MethodType):
            return self._all("method", value.__func__, value.__self__)
        if not isinstance(value, types.FunctionType):
            if wrapped := getattr(value, "__wrapped__", None):  # jax.jit and the like
                return self._all("wrapped", type(value).__qualname__, wrapped)
            if isinstance(value, types.BuiltinFunctionType | np.ufunc):
                return self._all("builtin", *_qualified_name(value))
            return None
        name, reads = None, {}
        if _is_library(value):
            name = _qualified_name(value)
        else:
            reads = {n: value.__globals__[n] for n in _global_names(value.__code__)
                     if n in value.__globals__}  # fmt: skip
        cells = [_cell_contents(cell) for cell in value.__closure__ or ()]
        return self._all(
            "function", name, value.__code__, value.__defaults__, value.__kwdefaults__, cells, reads
        )

    def _code(self, value: types.CodeType) -> bytes:
        counts = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount
        names = value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars
        return self._all(
            "code", value.co_code, value.co_consts, counts, names, value.co_flags & _FLAGS,
            value.co_exceptiontable,
        )  # fmt: skip

    def _class(self, value: type) -> bytes:
        if _is_library(value):
            return self._all("class", *_qualified_name(value))
        if issubclass(value, enum.Enum):
            members = {name: member.value for name, member in value.__members__.items()}
            return self._all("enum", value.__qualname__, members)
        hidden = ("__dict__", "__weakref__", "__module__", "__firstlineno__", "__doc__")
        body = {n: _unwrap_member(m) for n, m in vars(value).items() if n not in hidden}
        return self._all("class", value.__qualname__, value.__bases__, body)

    def _object(self, value: Any) -> bytes:
        kind = type(value)
        if (parts := jax.tree_util.default_registry.flatten_one_level(value)) is not None:
            children, structure = parts
            return self._all("node", kind, list(children), structure)
        if isinstance(value, enum.Enum):
            return self._all("member", kind, value.name)
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return self._all("dataclass", kind, fields)
        if isinstance(value, pathlib.PurePath):
            return self._all("path", str(value))
        state = _object_state(value)
        if isinstance(state, dict):  # values of cached properties are not content
            cached = {n for c in kind.__mro__ for n, m in vars(c).items()
                      if isinstance(m, functools.cached_property)}  # fmt: skip
            state = {name: item for name, item in state.items() if name not in cached}
        if state is None:
            state = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        return self._all("object", kind, state)


def _hash(kind: str, *parts: bytes) -> bytes:
    digest = hashlib.sha256(f"{kind} {len(parts)} ".encode())
    for part in parts:
        digest.update(f"{len(part)} ".encode())
        digest.update(part)
    return digest.digest()


def _forget(key: int, dead: weakref.ref) -> None:
    if key in _arrays and _arrays[key][0] is dead:
        del _arrays[key]


def _qualified_name(value: Any) -> tuple[str, Any]:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", repr(value))
    return str(getattr(value, "__module__", "")), name


def _is_library(value: Any) -> bool:
    return _qualified_name(value)[0].split(".")[0] in _LIBRARIES


def _global_names(code: types.CodeType) -> set[str]:
    """Return the names that code and the code nested in it look up."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_global_names, inner))


def _cell_contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return "an empty cell"


def _unwrap_member(member: Any) -> Any:
    """Return the functions of a property, or the function of a static or class method."""
    if isinstance(member, property):
        return [member.fget, member.fset, member.fdel]
    if isinstance(member, functools.cached_property):
        return member.func
    return getattr(member, "__func__", member)


def _object_state(value: Any) -> Any:
    """Return the state of a Python object; None for other objects."""
    try:
        return value.__getstate__()
    except Exception:
        return None
