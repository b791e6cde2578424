"""Checks of arguments, which raise an error of one line before any computation."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from mllm_jax.files import shown

MOST = 2**31 - 1  # numbers are int32 inside a program


def type_error(name: str, value: Any, wanted: str) -> ValueError:
    """Return the error about an argument of a wrong type.

    Args:
      name: The name of the argument.
      value: The given value.
      wanted: A description of what is expected.
    """
    return ValueError(f"{name} is of type {type(value).__name__:.60}, expected {wanted}")


def require_whole(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """Return an integer argument as an int.

    Args:
      name: The name of the argument, for the message.
      value: The given value.
      least: The smallest allowed number.
      most: The largest allowed number.

    Raises:
      ValueError: It is not an integer from `least` to `most`.
    """
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:  # a float, a string or a tracer
        number = None
    if number is None or not least <= number <= most:
        limit = "" if number is None or number < least else f" to {most}"
        given = shown(value if number is None else number)
        raise ValueError(f"{name}={given} is not a whole number from {least}{limit}")
    return number


def require_number(name: str, value: Any, most: float = math.inf) -> float:
    """Return an argument that is a finite number from 0 to `most`; see `require_whole`.

    Raises:
      ValueError: It is not such a number.
    """
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or not 0 <= number <= most:
        limit = "" if most == math.inf else f" to {most}"
        raise ValueError(f"{name}={shown(value)} is not a finite number from 0{limit}")
    return number
