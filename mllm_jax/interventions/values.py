"""Values of edits in the shape of a site: infer their axes, and orthonormalise bases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.numerics import precision
from mllm_jax.sites import Address, SiteShape
from mllm_jax.typing import AnyArray, Shaped


def is_real(array: AnyArray) -> bool:
    """Return whether an array holds real numbers.

    Casting would drop the imaginary part of a complex number, and turn None into NaN.
    """
    return any(jnp.issubdtype(array.dtype, kind) for kind in (np.floating, np.integer, np.bool_))


def fit_value(
    value: Shaped[AnyArray, ...], address: Address, spec: SiteShape
) -> Shaped[AnyArray, "L ..."]:
    """Return a value with a leading L axis and then the rank of the site."""
    _require_numbers(value, address)
    shape = _broadcastable_shape(value.shape, address, spec)
    if shape[0] > 1 and not address.site.is_latents:
        _require_layers_in_order(address, shape[0])
    with np.errstate(over="ignore"):  # which is refused below
        full = value.astype(spec.dtype).reshape(shape)
    _require_in_range(value, full, address)
    if value.ndim:  # a scalar stays one, however many units are listed
        full = _scatter_units(full, address, spec)
    return _per_layer(full, spec.layers)


def fit_basis(
    basis: Shaped[AnyArray, ...], address: Address, spec: SiteShape
) -> Shaped[AnyArray, "L D r"]:
    """Return orthonormal columns that span the given ones, in float32 or better."""
    site = address.site
    _require_numbers(basis, address)
    basis = basis[:, None] if basis.ndim == 1 else basis
    if basis.ndim != 2 or basis.shape[0] != spec.shape[-1]:
        raise ValueError(
            f"{site.name}: the basis is {basis.shape}, expected [{spec.shape[-1]}, directions]"
        )
    known = not isinstance(basis, jax.core.Tracer)
    if known:
        basis = np.asarray(basis)
        basis = basis.astype(precision.at_least_float32_dtype(basis.dtype))
    if known and not np.isfinite(basis).all():
        raise ValueError(f"{site.name}: the basis has numbers that are not finite")
    if known and (rank := np.linalg.matrix_rank(basis)) < basis.shape[1]:
        raise ValueError(
            f"{site.name}: the {basis.shape[1]} directions of the basis span only {rank}"
        )
    basis = basis.astype(precision.at_least_float32_dtype(spec.dtype))
    columns = np.linalg.qr(basis)[0] if known else precision.orthonormalize(basis)
    return _per_layer(columns[None], spec.layers)


def _require_in_range(value: AnyArray, cast: AnyArray, address: Address) -> None:
    """Raise ValueError if a finite value is known to be infinite in the dtype of a site."""
    if isinstance(value, jax.core.Tracer) or value.dtype == cast.dtype:
        return
    if np.isfinite(value).all() and not np.isfinite(cast).all():
        largest = float(np.abs(np.asarray(value)).max())
        raise ValueError(
            f"{address.site.name}: a value of {largest:.3g} is infinite in the site's dtype "
            f"{cast.dtype}"
        )


def _require_numbers(value: Shaped[AnyArray, ...], address: Address) -> None:
    """Raise ValueError unless a value is real."""
    if not is_real(value):
        raise ValueError(f"{address.site.name}: a value must hold real numbers, not {value.dtype}")


def _broadcastable_shape(
    given: tuple[int, ...], address: Address, spec: SiteShape
) -> tuple[int, ...]:
    """Return the shape of a value with all axes of the site, 1 where it repeats.

    The axes are inferred from their number and lengths, and must be unambiguous.
    """
    site = address.site
    letters, full = ("L", *site.axes), (spec.layers, *spec.shape)
    unit, every = 1 + site.unit_axis, tuple(range(len(full)))
    forms = ((), (unit,), (0, unit), every[unit:], (0, *every[unit:]), every[1:], every)

    def fits(n: int, axis: int) -> bool:
        return n in (1, full[axis]) or (axis == unit and n == _num_listed(address))

    readings = {}
    for axes in forms:
        if len(axes) == len(given) and all(map(fits, given, axes)):
            lengths = dict(zip(axes, given, strict=True))
            readings[tuple(lengths.get(axis, 1) for axis in every)] = axes
    if not readings:
        raise ValueError(
            f"{site.name}: a value of shape {given} does not fit; the site is "
            f"[{' '.join(letters)}] = {list(full)}"
        )
    if len(readings) > 1:
        names = " or ".join(f"[{' '.join(letters[a] for a in axes)}]" for axes in readings.values())
        raise ValueError(
            f"{site.name}: a value of shape {given} may be {names}; write it with all axes of "
            f"[{' '.join(letters)}]: {' or '.join(str(list(shape)) for shape in readings)}"
        )
    return next(iter(readings))


def _require_layers_in_order(address: Address, layers: int) -> None:
    """Raise ValueError if a value for each layer may follow a list of layers in another order."""
    listed = address.layers.value
    if address.layers.form != "index" or isinstance(listed, jax.core.Tracer):
        return
    if len(listed) == layers and (np.asarray(listed) % layers != np.arange(layers)).any():
        raise ValueError(
            f"{address.site.name}: a value for each of {layers} layers is in the order of the "
            f"layers, not of the list {np.asarray(listed).tolist()}: list them in order"
        )


def _num_listed(address: Address) -> int | None:
    """Return the number of units that the address lists; None if it lists none."""
    return len(address.units.value) if address.units.form == "index" else None


def _per_layer(array: AnyArray, layers: int) -> AnyArray:
    if array.shape[0] == layers:
        return array
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.broadcast_to(array, (layers, *array.shape[1:]))


def _scatter_units(value: AnyArray, address: Address, spec: SiteShape) -> AnyArray:
    """Put values that are given only for the listed units at the positions of these units."""
    axis = 1 + address.site.unit_axis
    if value.shape[axis] != _num_listed(address):
        return value
    units = address.units.value
    shape = tuple(spec.shape[axis - 1] if i == axis else n for i, n in enumerate(value.shape))
    at = (*(slice(None),) * axis, units)
    if not isinstance(units, jax.core.Tracer):
        number, times = np.unique(np.asarray(units) % shape[axis], return_counts=True)
        if (times > 1).any():
            raise ValueError(
                f"{address.site.name}: unit {number[times > 1][0]} is listed twice with separate "
                "values: list it once"
            )
    if isinstance(value, jax.Array) or isinstance(units, jax.Array):
        return jnp.zeros(shape, value.dtype).at[at].set(value)
    full = np.zeros(shape, value.dtype)
    full[at] = value
    return full
