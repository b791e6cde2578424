"""Rotary embeddings in a `text_config`: `rope_theta`, `rope_scaling` and `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mllm_jax.checkpoints import schema
from mllm_jax.models.rotary import RopeScaling, RopeSections

THETA = schema.optional(schema.real(1, 1e11))
FIELDS = {
    "rope_theta": (THETA, None),
    "rope_parameters": (schema.PART, None),
    "rope_scaling": (schema.PART, None),
}
_FACTOR = schema.optional(schema.real(1e-6, 1e6))
_KINDS = "default", "linear", "llama3"
_SCALING = {
    "rope_theta": (THETA, None),
    "factor": (_FACTOR, None),
    "low_freq_factor": (_FACTOR, None),
    "high_freq_factor": (_FACTOR, None),
    "original_max_position_embeddings": (schema.optional(schema.PLACES), None),
    "partial_rotary_factor": (schema.only(1, 1.0, None), None),
}
_LLAMA3 = "low_freq_factor", "high_freq_factor"
_SECTIONS = schema.optional(schema.many(schema.whole(0, 2**12), 3, 3))
_BY_LAYER_TYPE = {"full_attention": (schema.PART, None), "sliding_attention": (schema.PART, None)}


class Rope(NamedTuple):
    """The rotary embeddings of a language model; see the fields of `DecoderConfig`."""

    theta: float
    scaling: RopeScaling | None = None
    sections: RopeSections | None = None
    local_theta: float | None = None


def read(
    text: Mapping[str, Any],
    theta: float,
    sections: RopeSections | None,
    prefix: str,
    problems: list[str],
) -> Rope:
    """Read the rotary embeddings of a model in which they are the same in all layers.

    Args:
      text: The fields of the model.
      theta: The base if no field has it.
      sections: The sections if no field has them; None if a position is one number.
      prefix: The prefix of the names, for an error.
      problems: A list to which problems are appended.
    """
    names = [name for name in ("rope_scaling", "rope_parameters") if text[name]]
    parts = [_read_part(text[n], sections, f"{prefix}{n}.", problems) for n in names]
    thetas = {text["rope_theta"], *(part["rope_theta"] for part in parts)} - {None}
    if len(thetas) > 1:
        problems.append(f"{prefix[:-1] or 'it'} has two values of rope_theta: {sorted(thetas)}")
    longest = text["max_position_embeddings"]
    read = [
        (_scaling(part, longest, f"{prefix}{n}", problems), _sections(part, sections))
        for n, part in zip(names, parts, strict=True)
    ] or [(None, sections)]
    if len(set(read)) > 1:
        problems.append(f"{prefix}rope_scaling and {prefix}rope_parameters differ; remove one")
    scaling, sections = read[0]
    return Rope(float(next(iter(thetas), theta)), scaling, sections)


def read_by_layer_type(
    text: Mapping[str, Any], theta: float, local: float, prefix: str, problems: list[str]
) -> Rope:
    """Read the rotary embeddings of a model (Gemma 3) whose layers with a window have their own.

    Args:
      text: The fields of the model, `rope_parameters` by layer type.
      theta: The base of layers without a window if no field has it.
      local: The base of layers with a window if no field has it.
      prefix: The prefix of the names, for an error.
      problems: A list to which problems are appended.
    """
    by_type = schema.read(
        text["rope_parameters"] or {}, _BY_LAYER_TYPE, (), f"{prefix}rope_parameters.", problems
    )
    whole = {**text, "rope_parameters": by_type["full_attention"]}
    windowed = {
        **text,
        "rope_parameters": by_type["sliding_attention"],
        "rope_scaling": None,
        "rope_theta": text["rope_local_base_freq"],
    }
    rope = read(whole, theta, None, prefix, problems)
    inner = read(windowed, local, None, prefix, problems)
    if inner.scaling is not None:
        problems.append(
            f"{prefix}rope_parameters.sliding_attention has rope_type={inner.scaling.kind!r}: "
            "scaling in layers with a window is not supported, only 'default'"
        )
    return rope._replace(local_theta=inner.theta)


def to_hf(
    theta: float,
    scaling: RopeScaling | None,
    sections: RopeSections | None,
    local_theta: float | None,
) -> dict[str, Any]:
    """Return the fields, in the form that transformers 4 and 5 both read."""
    part: dict[str, Any] = {}
    if scaling is not None:
        part |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            part |= {
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original_length,
            }
    if sections is not None:
        part = {"rope_type": "default"} | part | {"mrope_section": list(sections.sizes)}
        if sections.interleaved:
            part["mrope_interleaved"] = True
    fields: dict[str, Any] = {"rope_theta": theta}
    if part:
        fields["rope_scaling"] = part
    if local_theta is not None:
        fields["rope_local_base_freq"] = local_theta
    return fields


def _read_part(
    part: Mapping[str, Any], sections: RopeSections | None, prefix: str, problems: list[str]
) -> dict[str, Any]:
    """Return the fields of `rope_scaling` or `rope_parameters`; `kind` is the type."""
    # Qwen2-VL configs call the sections a type of scaling.
    kinds = schema.only(*_KINDS, "mrope") if sections else schema.only(*_KINDS)
    table: dict[str, tuple[schema.Kind, Any]] = {
        **_SCALING,
        "rope_type": (kinds, "default"),
        "type": (kinds, "default"),
    }
    if sections is not None:
        table |= {
            "mrope_section": (_SECTIONS, None),
            "mrope_interleaved": (schema.only(sections.interleaved), sections.interleaved),
        }
    names = [name for name in ("rope_type", "type") if name in part]
    if not all(kinds.accepts(part[name]) for name in names):
        part = {name: part[name] for name in names}  # of another type every field is unknown
    fields = schema.read(part, table, (), prefix, problems)
    kind = fields[names[0]] if names else "default"
    return fields | {"kind": "default" if kind == "mrope" else kind}


def _scaling(
    part: Mapping[str, Any], longest: int, where: str, problems: list[str]
) -> RopeScaling | None:
    """Return the scaling of the fields of a part; append what is missing to `problems`."""
    kind, factor = part["kind"], part["factor"]
    if kind == "default":
        if factor not in (None, 1):
            problems.append(f"{where} has factor={factor} but no rope_type that uses it")
        return None
    needed = ("factor", *(_LLAMA3 if kind == "llama3" else ()))
    missing = [name for name in needed if part[name] is None]
    if missing:
        problems.append(f"{where} of type {kind!r} lacks {', '.join(missing)}")
        return None
    if kind == "linear":
        return RopeScaling(kind=kind, factor=float(factor))
    low, high = (float(part[name]) for name in _LLAMA3)
    if low >= high:
        problems.append(f"{where} has low_freq_factor={low} not below high_freq_factor={high}")
        return None
    length = part["original_max_position_embeddings"] or longest
    return RopeScaling(kind=kind, factor=float(factor), low=low, high=high, original_length=length)


def _sections(part: Mapping[str, Any], default: RopeSections | None) -> RopeSections | None:
    if default is None or part["mrope_section"] is None:
        return default
    first, second, third = part["mrope_section"]
    return RopeSections((first, second, third), default.interleaved)
