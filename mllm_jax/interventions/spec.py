"""Edits as strings, for the command line, and as JSON, to stand beside a result.

    ablate lm.mlp.act[12,@neurons.json] >> add lm.resid_post[18:24] @v.npy*4 where=text

A string is a chain of edits: kind, site with its address, values, then `name=value` options.
A value is a number, or an array in a file (`@file.npy`, `@file.json`), times a number if wanted.
A selector is a name of `tokens.NAMED`, `row(3)`, `column(3)`, `tile(0)` or `@mask.npy`, joined by
`|` and `&` (which binds closer), turned around by `~`.
"""

from __future__ import annotations

import base64
import json
import pathlib
import re
from typing import Any

import numpy as np

from mllm_jax import sites, tokens
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.edits import Edit, Edits

VALUES = {"scale": "value", "add": "value", "replace": "value", "project_out": "basis"}
_ITEM = re.compile(r"(?P<site>[a-z_.]+)(\[(?P<at>[^\]]*)\])?$")


def parse(text: str, root: str | pathlib.Path = ".") -> Edits:
    """Edits of a string.

    Args:
      root: the folder that `@files` are relative to.

    Raises:
      ValueError: what is not understood, where it stands, and what would be.
    """
    chain = Edits()
    for number, part in enumerate(text.split(">>"), 1):
        try:
            chain = chain >> _parse(part.split(), pathlib.Path(root))
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise ValueError(f"edit {number}, '{part.strip()}': {reason}") from error
    return chain


def _parse(words: list[str], root: pathlib.Path) -> Edits:
    kinds = ("ablate", "patch", "knockout", *VALUES)
    if not words or words[0] not in kinds:
        raise ValueError(f"an edit begins with one of {', '.join(kinds)}")
    kind, target, *rest = words if len(words) > 1 else [*words, ""]
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    values = [word for word in rest if "=" not in word]
    address = _address(target, root)
    if kind in VALUES:
        if len(values) != 1:
            raise ValueError(f"{kind} takes one value, such as 2.0 or @file.npy*0.5")
        given: dict[str, Any] = {VALUES[kind]: _value(values[0], root)}
        if kind == "scale":
            given = {"by": given["value"]}
    elif values:
        raise ValueError(f"{kind} takes no value, got {' '.join(values)}")
    else:
        given = {}
    names = {"knockout": ("to", "on"), "patch": ("where", "source", "into")}.get(kind, ("where",))
    for name, text in options.items():
        if name not in names:
            raise ValueError(f"{kind} has no option '{name}'; it has: {', '.join(names)}")
        given[name] = int(text) if name in ("source", "into") else _where(text, root)
    return getattr(edits_, kind)(address, **given)


def _address(text: str, root: pathlib.Path):
    match = _ITEM.match(text)
    if not match:
        raise ValueError(f"'{text}' is no site with an address, such as lm.mlp.act[12,0:8]")
    name = match["site"]
    site = sites.lm.attn.mask if name == "lm.attn" else sites.get(name)
    if match["at"] is None:
        return sites.Address.of(site)
    return site[tuple(_index(part, root) for part in _commas(match["at"]))]


def _commas(text: str) -> list[str]:
    """Split at commas; `1+5+9` is a list of indices, so that commas only part the axes."""
    return [part.strip() for part in text.split(",")]


def _index(text: str, root: pathlib.Path):
    if text.startswith("@"):
        return np.asarray(_file(text[1:], root))
    if text in ("", ":"):
        return slice(None)
    if ":" in text:
        return slice(*(int(part) if part else None for part in text.split(":")))
    parts = [int(part) for part in text.split("+")]
    return parts[0] if len(parts) == 1 else np.array(parts)


def _value(text: str, root: pathlib.Path):
    if not text.startswith("@"):
        return np.float32(text)
    file, _, factor = text[1:].partition("*")
    return np.asarray(_file(file, root), np.float32) * np.float32(factor or 1)


def _file(name: str, root: pathlib.Path):
    path = root / name
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    raise ValueError(f"'{name}' is neither .npy nor .json")


def _where(text: str, root: pathlib.Path) -> tokens.Where:
    if "|" in text:
        first, *rest = (_where(part, root) for part in text.split("|"))
        for part in rest:
            first = first | part
        return first
    if "&" in text:
        first, *rest = (_where(part, root) for part in text.split("&"))
        for part in rest:
            first = first & part
        return first
    if text.startswith("~"):
        return ~_where(text[1:], root)
    if text.startswith("@"):
        return tokens.mask(np.asarray(_file(text[1:], root), bool))
    call = re.match(r"(row|column|tile)\((\d+)\)$", text)
    if call:
        return getattr(tokens, call[1])(int(call[2]))
    return tokens.of(text)


def to_json(edits: Edits) -> list[dict[str, Any]]:
    """Plain values that `from_json` turns back into the same edits, bit for bit."""
    return [_edit_json(edit) for edit in edits]


def from_json(items: list[dict[str, Any]]) -> Edits:
    return Edits(tuple(_edit_of(item) for item in items))


def _edit_json(edit: Edit) -> dict[str, Any]:
    if edit.fn is not None:
        raise ValueError(f"a call of {edit.fn} is code and cannot be written as data")
    return {
        "kind": edit.kind,
        "site": edit.address.site.name,
        "layers": _selection_json(edit.address.layers),
        "units": _selection_json(edit.address.units),
        "where": _where_json(edit.where),
        "values": {name: _array_json(value) for name, value in edit.values.items()},
        "route": None if edit.route is None else [int(row) for row in edit.route],
        "on": None if edit.on is None else _where_json(edit.on),
    }


def _edit_of(item: dict[str, Any]) -> Edit:
    address = sites.Address(
        sites.get(item["site"]), _selection_of(item["layers"]), _selection_of(item["units"])
    )
    return Edit(
        kind=item["kind"],
        address=address,
        where=_where_of(item["where"]),
        values={name: _array_of(value) for name, value in item["values"].items()},
        route=None if item["route"] is None else tuple(np.int32(row) for row in item["route"]),
        on=None if item["on"] is None else _where_of(item["on"]),
    )


def _selection_json(selection: sites.Selection) -> dict[str, Any]:
    value = selection.value
    return {"form": selection.form, "value": None if value is None else _array_json(value)}


def _selection_of(item: dict[str, Any]) -> sites.Selection:
    value = None if item["value"] is None else _array_of(item["value"])
    return sites.Selection(item["form"], value)


def _where_json(where: tokens.Where) -> dict[str, Any]:
    return {
        "form": where.form,
        "parts": [_where_json(part) for part in where.parts],
        "value": None if where.value is None else _array_json(where.value),
    }


def _where_of(item: dict[str, Any]) -> tokens.Where:
    value = None if item["value"] is None else _array_of(item["value"])
    return tokens.Where(item["form"], tuple(_where_of(part) for part in item["parts"]), value)


def _array_json(value) -> dict[str, Any]:
    array = np.asarray(value)
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def _array_of(item: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(item["data"])
    return np.frombuffer(data, item["dtype"]).reshape(item["shape"]).copy()
