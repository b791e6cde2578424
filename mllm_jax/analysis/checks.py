"""Checks of the array arguments of `analysis`: finite numbers, as float64."""

from __future__ import annotations

from typing import Any

import numpy as np

COUNTS = {1: "one axis", 2: "two axes", 3: "three axes"}


def finite(values: Any, name: str, *, axes: str | None = None) -> np.ndarray:
    """Return an array of finite numbers as float64.

    Args:
      values: An array.
      name: Name of the argument, for the error message.
      axes: Its axes, such as "[N, F]"; None allows any.

    Raises:
      ValueError: It is not an array of numbers, has other axes, or holds values that are not
        finite; the message gives the index of the first one.
    """
    values = numbers(values, name, axes=axes).astype(np.float64)
    _refuse(values, ~np.isfinite(values), name, "every value must be finite")
    return values


def not_nan(values: Any, name: str, *, axes: str | None = None) -> np.ndarray:
    """Return an array like `finite`, but allow infinite values, such as a score of -inf."""
    values = numbers(values, name, axes=axes).astype(np.float64)
    if np.isnan(values).any():
        raise ValueError(f"{name}{np.argwhere(np.isnan(values))[0].tolist()} is not a number")
    return values


def numbers(values: Any, name: str, *, axes: str | None = None) -> np.ndarray:
    """Return an array of real numbers in its own dtype."""
    values = np.asarray(values)
    real = values.dtype == bool or np.issubdtype(values.dtype, np.number)
    if not values.size and values.dtype == object:
        real = True
    # bfloat16 and similar dtypes are from ml_dtypes, and NumPy has no kind for them.
    if np.iscomplexobj(values) or not (real or values.dtype.kind == "V"):
        raise ValueError(f"{name} must hold real numbers, not {values.dtype}")
    if axes is not None and values.ndim != (count := axes.count(",") + 1):
        raise ValueError(f"{name} must be {axes}, of {COUNTS[count]}, not of shape {values.shape}")
    return values


def at_least(values: np.ndarray, least: float, name: str) -> np.ndarray:
    """Return the values if none is below `least`."""
    _refuse(values, values < least, name, f"no value may be below {least}")
    return values


def integers(values: Any, name: str, *, axes: str | None = None) -> np.ndarray:
    """Return the values if they are integers."""
    values = numbers(values, name, axes=axes)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be integers, not {values.dtype}")
    return values


def mask(values: Any, name: str) -> np.ndarray:
    """Return the values if they are booleans."""
    values = np.asarray(values)
    if values.dtype != bool:
        raise ValueError(f"{name} must be a mask of booleans, not {values.dtype}")
    return values


def one_a_row(values: Any, rows: int) -> Any:
    """Return the values of a metric, traced or not, if they are one number for each row."""
    if np.shape(values) != (rows,):
        raise ValueError(
            f"the metric gives an array of shape {list(np.shape(values))}, expected [{rows}]: one "
            "number for each row of the batch, without a mean over rows"
        )
    return values


def _refuse(values: np.ndarray, wrong: np.ndarray, name: str, rule: str) -> None:
    if wrong.any():
        place = np.argwhere(wrong)[0].tolist()
        at = str(place) if place else ""
        raise ValueError(f"{name}{at} is {values[tuple(place)]}; {rule}")
