"""Edits and captures as text, for the command line, and as JSON, to be stored with a result.

    ablate lm.mlp.act[12,@neurons.json] >> add lm.resid_post[18:24] @v.npy*4 where=text
    fire=stats lm.mlp.act by=kind; lens=lens lm.resid_post[18:24] k=5 where=image

Edits are chained by `>>`. Each is written as its kind, its site with an address, a value if the
kind takes one, and `name=value` options. Captures have names and are separated by `;`. Each is
written as its form, its site with an address, and options. `grammar.EDITS` and
`grammar.CAPTURES` register the values and options that the tables below list.

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
| mean | where |
| keep | k, where |
| mass | on, by (`kind`, kinds, or `tile`), where, heads (`mean`) |
| attention | where, heads |
| attention_map | to, on, heads |
| rollout | to, on |
| stats | by (`kind`, or kinds `image,question`), where |
| lens | k, by, where |
| distribution | by, where |
| top, bottom | k, where |
| sample | k, edges, where |
| histogram | edges, by, where |
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import operator
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mllm_jax import sites, tokens
from mllm_jax.interventions import grammar
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import KINDS, Edit, Edits, per_step
from mllm_jax.interventions.forms import FORMS
from mllm_jax.typing import ArrayLike

_JOINS = {"or": operator.or_, "and": operator.and_}


def parse(text: str, root: str | pathlib.Path = ".") -> Edits:
    """Parse edits.

    Args:
      text: The edits, chained by `>>`.
      root: The folder that `@files` are relative to.

    Raises:
      ValueError: A part is invalid; the message states which, and what is expected.
    """
    chain = Edits()
    for item in grammar.parse(text, root):
        with grammar.located(item.place):
            chain = chain >> _edit(item)
    return chain


def parse_captures(text: str, root: str | pathlib.Path = ".") -> dict[str, Capture]:
    """Parse captures, separated by `;`, by name; arguments and errors as in `parse`."""
    captures: dict[str, Capture] = {}
    for name, item in grammar.parse_captures(text, root).items():
        with grammar.located(item.place):
            build = FORMS[item.kind].build
            assert build is not None, f"text has the form {item.kind}, so it has a function"
            captures[name] = build(_address(item), **_options(item.options))
    return captures


def parse_where(text: str, root: str | pathlib.Path = ".") -> tokens.Where:
    """Parse a selector of tokens; arguments and errors as in `parse`."""
    with grammar.located(f"where='{text}'"):
        return _where(grammar.parse_where(text, pathlib.Path(root)))


def _edit(item: grammar.Item) -> Edits:
    arguments = _options(item.options)
    steps = arguments.pop("steps", None)
    if (name := grammar.EDITS[item.kind].value) is not None:
        arguments[name] = _value(item.value)
    edit = KINDS[item.kind].build(_address(item), **arguments)
    return edit if steps is None else per_step(edit, steps)


def _options(options: Mapping[str, grammar.Option]) -> dict[str, Any]:
    builders: dict[str, Callable[[Any], Any]] = {
        "where": _where, "to": _where, "on": _where, "source": _index, "into": _index,
        "basis": _value, "edges": _value, "steps": _value,
    }  # fmt: skip
    return {name: builders.get(name, lambda x: x)(value) for name, value in options.items()}


def _address(item: grammar.Item) -> sites.Address:
    if item.at is None:
        return sites.Address.of(item.site)
    if isinstance(item.at, list):
        return item.site[np.array(item.at, np.int32)]
    parts = tuple(map(_index, item.at))
    lists = len(parts) == 2 and all(isinstance(p, np.ndarray) and p.dtype != bool for p in parts)
    return item.site[np.ix_(*parts) if lists else parts]


def _index(index: grammar.Index) -> int | slice | np.ndarray:
    if isinstance(index, grammar.File):
        return np.asarray(_file(index))
    return np.array(index) if isinstance(index, list) else index


def _value(value: grammar.Value | None) -> np.float32 | np.ndarray:
    if isinstance(value, grammar.File):
        return np.asarray(_file(value), np.float32) * np.float32(value.factor)
    return np.array(value, np.float32) if isinstance(value, list) else np.float32(value)


def _file(file: grammar.File) -> Any:
    if file.path.suffix == ".npy":
        return np.load(file.path, allow_pickle=False)
    return json.loads(file.path.read_text())


def _where(selector: grammar.Tokens | grammar.File) -> tokens.Where:
    if isinstance(selector, grammar.File):
        return tokens.mask(np.asarray(_file(selector), bool))
    name, parts = selector.name, selector.parts
    if name in _JOINS:
        return functools.reduce(_JOINS[name], map(_where, parts))
    if name == "not":
        return ~_where(parts[0])
    return getattr(tokens, name)(*parts) if parts else tokens.of(name)


def to_json(items: Edits | dict[str, Capture]) -> list[Any] | dict[str, Any]:
    """Return edits as a list of plain values, captures as a dictionary of them.

    `from_json` restores the same edits and captures, bit for bit.

    Raises:
      ValueError: An edit is a `call`, whose function is code, or a `splice`.
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
    if edit.splice is not None:
        raise ValueError(
            f"the splice at {edit.address.site} holds a dictionary, which has no JSON form: record "
            "its file, and write the edits of its latents without it"
        )
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
        "edges": _optional(_array_json, capture.edges),
        **({} if capture.heads == "each" else {"heads": capture.heads}),  # keeps older digests
    }


def _capture_of(item: dict[str, Any]) -> Capture:
    return Capture(
        form=item["form"],
        address=_address_of(item),
        where=_where_of(item["where"]),
        by=_optional(tuple, item["by"]),
        k=item["k"],
        on=_optional(_where_of, item["on"]),
        edges=_optional(_array_of, item.get("edges")),
        heads=item.get("heads", "each"),
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
