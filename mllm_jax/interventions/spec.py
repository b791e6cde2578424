"""Edits and captures as text, for the command line, and as JSON, to be stored beside a result.

    ablate lm.mlp.act[12,@neurons.json] >> add lm.resid_post[18:24] @v.npy*4 where=text
    fire=stats lm.mlp.act by=kind; lens=lens lm.resid_post[18:24] k=5 where=image

Edits are chained by `>>`. Each is written as its kind, its site with an address, a value if the
kind takes one, and `name=value` options. Captures have names and are separated by `;`. Each is
written as its form, its site with an address, and options. `edits.KINDS` and `captures.FORMS`
register the values and options that the tables below list.

An address is written as in Python, except that a list is `1+5+9` (`1+` for one entry) or a file.
Layers and neurons mean these neurons in each of these layers; pairs of one layer and one neuron
are written `lm.mlp.act[(0,5)+(1,6)]`, or stored in a file as [n, 2].
A value is a number, several numbers `0.5,1,2`, or an array in a file (`@file.npy`, `@file.json`),
optionally times a number. A selector is a name of `tokens.NAMED`, `row(3)`, `column(3)`, `tile(0)`
or `@mask.npy`; selectors are combined by `|` and `&` (which binds more tightly) and negated by `~`.

| edit | value | options |
|---|---|---|
| ablate | | where, steps |
| scale, add, replace | value | where, steps |
| project_out | basis | where, steps |
| patch | | source, into (rows), basis, where, steps |
| knockout | | to, on |

| capture | options |
|---|---|
| keep, mean | where |
| mass | on, where |
| stats | by (`kind`, or kinds `image,question`), where |
| lens | k, by, where |
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import operator
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mllm_jax import sites, tokens
from mllm_jax.interventions.captures import FORMS, Capture, Form
from mllm_jax.interventions.edits import KINDS, Edit, EditKind, Edits, per_step
from mllm_jax.typing import ArrayLike

# The kinds and forms that text can express.
EDITS = {name: kind for name, kind in KINDS.items() if kind.options is not None}
CAPTURES = {name: form for name, form in FORMS.items() if form.options is not None}
_PAIRS = r"\(-?\d+,-?\d+\)(\+\(-?\d+,-?\d+\))*\+?"
_ITEM = re.compile(r"(?P<site>[a-z_.]+)(\[(?P<at>[^\]]*)\])?$")


def parse(text: str, root: str | pathlib.Path = ".") -> Edits:
    """Parse edits.

    Args:
      text: The edits, chained by `>>`.
      root: The folder that `@files` are relative to.

    Raises:
      ValueError: A part is not understood; the message says which, and what is expected.
    """
    chain = Edits()
    for number, part in enumerate(text.split(">>"), 1):
        with _error_prefix(f"edit {number}, '{part.strip()}'"):
            chain = chain >> _edit(part.split(), pathlib.Path(root))
    return chain


def parse_captures(text: str, root: str | pathlib.Path = ".") -> dict[str, Capture]:
    """Parse captures, separated by `;`, by name; arguments and errors as `parse`."""
    captures: dict[str, Capture] = {}
    for part in text.split(";"):
        with _error_prefix(f"capture '{part.strip()}'"):
            name, _, rest = (piece.strip() for piece in part.partition("="))
            if not name.isidentifier():
                raise ValueError(
                    f"a capture begins with its name: fire=stats lm.mlp.act, not '{name}'"
                )
            if name in captures:
                raise ValueError(f"there is already a capture '{name}'")
            captures[name] = _capture(rest.split(), pathlib.Path(root))
    return captures


@contextlib.contextmanager
def _error_prefix(place: str) -> Iterator[None]:
    """Turn errors inside into a ValueError that begins with the place in the text."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(f"{place}: {reason}") from error


def _edit(words: list[str], root: pathlib.Path) -> Edits:
    name, target, values, options = _words(words, "an edit", EDITS)
    kind, arguments = EDITS[name], _options(options, root)
    if kind.value is not None:
        if len(values) != 1:
            raise ValueError(f"{name} takes one value, such as 2.0 or @file.npy*0.5")
        arguments[kind.value] = _value(values[0], root)
    elif values:
        raise ValueError(f"{name} takes no value, got {' '.join(values)}")
    steps = arguments.pop("steps", None)
    edit = kind.build(_address(target, root), **arguments)
    return edit if steps is None else per_step(edit, steps)


def _capture(words: list[str], root: pathlib.Path) -> Capture:
    name, target, values, options = _words(words, "a capture", CAPTURES)
    if values:
        raise ValueError(f"{name} takes no value, got {' '.join(values)}")
    build = CAPTURES[name].build
    assert build is not None, f"{name} has options, so it has a function"
    return build(_address(target, root), **_options(options, root))


def _words(
    words: list[str], what: str, known: Mapping[str, EditKind | Form]
) -> tuple[str, str, list[str], dict[str, str]]:
    """Return the kind, the target, the values and the options of one edit or capture."""
    if not words or words[0] not in known:
        raise ValueError(f"{what} begins with one of {', '.join(known)}")
    kind, target, *rest = words if len(words) > 1 else [*words, ""]
    options: dict[str, str] = dict(word.split("=", 1) for word in rest if "=" in word)  # type: ignore[misc]
    allowed = known[kind].options or ()
    for name in options:
        if name not in allowed:
            raise ValueError(f"{kind} has no option '{name}'; it has: {', '.join(allowed)}")
    return kind, target, [word for word in rest if "=" not in word], options


def _options(options: dict[str, str], root: pathlib.Path) -> dict[str, Any]:
    parsers: dict[str, Callable[[str, pathlib.Path], Any]] = {
        "where": _where, "to": _where, "on": _where,
        "source": _index, "into": _index, "basis": _value, "steps": _value,
        "by": lambda text, _: tokens.kind if text == "kind" else tuple(text.split(",")),
        "k": lambda text, _: int(text),
    }  # fmt: skip
    return {name: parsers[name](text, root) for name, text in options.items()}


def _address(text: str, root: pathlib.Path) -> sites.Address:
    match = _ITEM.match(text)
    if not match:
        raise ValueError(f"'{text}' is not a site with an address, such as lm.mlp.act[12,0:8]")
    name = match["site"]
    site = sites.get(f"{name}.mask" if f"{name}.mask" in sites.BY_NAME else name)
    if match["at"] is None:
        return sites.Address.of(site)
    if re.fullmatch(_PAIRS, match["at"]):
        return site[np.array(re.findall(r"-?\d+", match["at"]), np.int32).reshape(-1, 2)]
    parts = tuple(_index(part.strip(), root) for part in match["at"].split(","))
    lists = len(parts) == 2 and all(isinstance(p, np.ndarray) and p.dtype != bool for p in parts)
    return site[np.ix_(*parts) if lists else parts]


def _index(text: str, root: pathlib.Path) -> int | slice | np.ndarray:
    if text.startswith("@"):
        return np.asarray(_file(text[1:], root))
    if text in ("", ":"):
        return slice(None)
    if ":" in text:
        return slice(*(int(part) if part else None for part in text.split(":")))
    if "+" in text:
        return np.array([int(part) for part in text.split("+") if part])
    return int(text)


def _value(text: str, root: pathlib.Path) -> np.float32 | np.ndarray:
    if not text.startswith("@"):
        numbers = np.array([float(part) for part in text.split(",")], np.float32)
        return numbers if "," in text else numbers[0]
    file, _, factor = text[1:].partition("*")
    return np.asarray(_file(file, root), np.float32) * np.float32(factor or 1)


def _file(name: str, root: pathlib.Path) -> Any:
    path = root / name
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    raise ValueError(f"'{name}' is neither .npy nor .json")


def _where(text: str, root: pathlib.Path) -> tokens.Where:
    for sign, join in (("|", operator.or_), ("&", operator.and_)):
        if sign in text:
            return functools.reduce(join, (_where(part, root) for part in text.split(sign)))
    if text.startswith("~"):
        return ~_where(text[1:], root)
    if text.startswith("@"):
        return tokens.mask(np.asarray(_file(text[1:], root), bool))
    call = re.match(r"(row|column|tile)\((\d+)\)$", text)
    if call:
        return getattr(tokens, call[1])(int(call[2]))
    return tokens.of(text)


def to_json(items: Edits | dict[str, Capture]) -> list[Any] | dict[str, Any]:
    """Return edits as a list of plain values, captures as a dictionary of them.

    `from_json` restores the same edits and captures, bit for bit.

    Raises:
      ValueError: An edit is a `call`, whose function is code.
    """
    if isinstance(items, Edits):
        return [_edit_json(edit) for edit in items]
    return {name: _capture_json(capture) for name, capture in items.items()}


def from_json(items: list[Any] | dict[str, Any]) -> Edits | dict[str, Capture]:
    """Invert `to_json`."""
    if isinstance(items, list):
        return Edits(tuple(_edit_of(item) for item in items))
    return {name: _capture_of(item) for name, item in items.items()}


def digest(items: Edits | dict[str, Capture]) -> str:
    """Return a short hash of edits or captures with all their arrays, to identify a result."""
    text = json.dumps(to_json(items), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _edit_json(edit: Edit) -> dict[str, Any]:
    if edit.fn is not None:
        raise ValueError(f"a call of {edit.fn} is code and cannot be written as JSON")
    return {
        "kind": edit.kind,
        **_address_json(edit.address),
        "where": _where_json(edit.where),
        "values": {name: _array_json(value) for name, value in edit.values.items()},
        "route": None if edit.route is None else [_array_json(rows) for rows in edit.route],
        "on": _optional(_where_json, edit.on),
        "strengths": _optional(_array_json, edit.strengths),
    }


def _edit_of(item: dict[str, Any]) -> Edit:
    return Edit(
        kind=item["kind"],
        address=_address_of(item),
        where=_where_of(item["where"]),
        values={name: _array_of(value) for name, value in item["values"].items()},
        route=_optional(_route_of, item["route"]),
        on=_optional(_where_of, item["on"]),
        strengths=_optional(_array_of, item["strengths"]),
    )


def _route_of(rows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    source, into = map(_array_of, rows)
    return source, into


def _capture_json(capture: Capture) -> dict[str, Any]:
    return {
        "form": capture.form,
        **_address_json(capture.address),
        "where": _where_json(capture.where),
        "by": _optional(list, capture.by),
        "k": capture.k,
        "on": _optional(_where_json, capture.on),
    }


def _capture_of(item: dict[str, Any]) -> Capture:
    return Capture(
        form=item["form"],
        address=_address_of(item),
        where=_where_of(item["where"]),
        by=_optional(tuple, item["by"]),
        k=item["k"],
        on=_optional(_where_of, item["on"]),
    )


def _optional(convert: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else convert(value)


def _address_json(address: sites.Address) -> dict[str, Any]:
    return {
        "site": address.site.name,
        "layers": _selection_json(address.layers),
        "units": _selection_json(address.units),
    }


def _address_of(item: dict[str, Any]) -> sites.Address:
    return sites.Address(
        sites.get(item["site"]), _selection_of(item["layers"]), _selection_of(item["units"])
    )


def _selection_json(selection: sites.Selection) -> dict[str, Any]:
    return {"form": selection.form, "value": _optional(_array_json, selection.value)}


def _selection_of(item: dict[str, Any]) -> sites.Selection:
    return sites.Selection(item["form"], _optional(_array_of, item["value"]))


def _where_json(where: tokens.Where) -> dict[str, Any]:
    return {
        "form": where.form,
        "parts": [_where_json(part) for part in where.parts],
        "value": _optional(_array_json, where.value),
    }


def _where_of(item: dict[str, Any]) -> tokens.Where:
    parts = tuple(_where_of(part) for part in item["parts"])
    return tokens.Where(item["form"], parts, _optional(_array_of, item["value"]))


def _array_json(value: ArrayLike) -> dict[str, Any]:
    array = np.asarray(value)
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def _array_of(item: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(item["data"])
    return np.frombuffer(data, item["dtype"]).reshape(item["shape"]).copy()
