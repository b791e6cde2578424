"""Chat templates of checkpoints, rendered as transformers does, within limits of time and size.

A template is an untrusted program. It runs in Jinja's immutable sandbox, so it reaches no file and
changes none of its arguments. Here its resources are limited too: each turn of a loop and call of a
macro is a step; each value that it builds has a weight, its number of characters (an object that a
list holds twice counts twice); and the result of an operation is bounded before it runs.
"""

from __future__ import annotations

import contextvars
import dataclasses
import datetime
import functools
import inspect
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

SOURCE = 2**16  # the most characters of a template
WEIGHT = 10**6  # the most characters of a value, and of the output, beside those of the chat
ITEM = 16  # the weight of an item of a list beside its characters
PRODUCT = 10**8  # the largest product of the weights of two operands
BITS = 10**4  # the most bits of an integer
SECONDS = 2.0
_WIDTH = re.compile(r"\d{5}|\*")  # a format width that is too large


class LimitError(ValueError):
    """A template takes more steps, or builds larger values, than the limits allow."""


@dataclasses.dataclass
class Budget:
    """The resources that a rendering has left.

    Attributes:
      steps: The number of steps.
      output: The number of characters of output.
      weight: The largest weight of a value.
      end: The time by which it must end.
    """

    steps: int
    output: int
    weight: int
    end: float

    def step(self) -> None:
        """Count a step."""
        self.steps -= 1
        if self.steps < 0:
            raise LimitError("it takes too many steps")
        if time.monotonic() > self.end:
            raise LimitError(f"it takes longer than {SECONDS:.0f} s")

    def put_out(self, value: Any) -> None:
        """Count a value as output."""
        self.output -= self.checked(value)
        if self.output < 0:
            raise LimitError("its text becomes too long")

    def checked(self, value: Any) -> int:
        """Return the weight of a value; raise LimitError if it is above the limit."""
        weight = weigh(value, self.weight)
        if weight > self.weight:
            raise LimitError("a value becomes too large")
        return weight

    def product(self, operands: list[Any]) -> None:
        """Raise LimitError if the product of the two heaviest operands is beyond the limit."""
        sizes = (abs(o) if type(o) is int else self.checked(o) for o in operands)
        if math.prod(sorted(sizes)[-2:]) > max(PRODUCT, self.weight):
            raise LimitError("the result of an operation would be too large")


_BUDGET: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


def weigh(value: Any, most: int) -> int:
    """Return the weight of a value; above `most` it is a lower bound."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, range):
        return len(value)
    if isinstance(value, _Counted):
        return jinja2.sandbox.MAX_RANGE  # an upper bound: its length is unknown until it has run
    if isinstance(value, int) and value.bit_length() > BITS:
        return most + 1
    items: Iterator[Any]
    if isinstance(value, dict):
        items = (part for pair in value.items() for part in pair)
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = iter(value)
    else:
        return 1
    total = 1
    for item in items:
        total += ITEM + weigh(item, most - total)
        if total > most:
            break
    return total


class _Counted:
    """An iterator whose items are steps."""

    def __init__(self, items: Iterator[Any]):
        self._items = items

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Any:
        item = next(self._items)
        budget = _BUDGET.get()
        budget.step()
        budget.put_out(item)
        return item


def _operate(call: Callable, operands: list[Any], *, form: Any = None) -> Any:
    """Return the result of a call, with its operands and its result within the limits.

    Args:
      call: A function that computes the result.
      operands: The operands.
      form: The format string, if the call formats.
    """
    budget = _BUDGET.get()
    budget.step()
    budget.product(operands)
    if isinstance(form, str) and _WIDTH.search(form):
        raise LimitError("a format has too large a width")
    result = call()
    if isinstance(result, Iterator) and not isinstance(result, _Counted):
        return _Counted(result)
    budget.checked(result)
    return result


def _limited(name: str, function: Callable) -> Callable:
    """Return a filter whose operands and results are within the limits."""

    @functools.wraps(function)
    def limited(*args, **kwargs):
        form = next(iter(a for a in args if isinstance(a, str)), None) if name == "format" else None
        operands = [*args, *kwargs.values()]
        return _operate(lambda: function(*args, **kwargs), operands, form=form)

    return limited


class _Count(jinja2.visitor.NodeTransformer):
    """Inserts the checks into a template."""

    def _body(self, node):
        node = self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(_call("_step", lineno=node.lineno)))
        return node

    visit_For = visit_Macro = visit_CallBlock = _body

    def visit_Concat(self, node):
        parts = jinja2.nodes.List([self.visit(part) for part in node.nodes], lineno=node.lineno)
        return _call("_concat", parts, lineno=node.lineno)

    def _built(self, node):
        node = self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return _call("_built", node, lineno=node.lineno)

    visit_List = visit_Tuple = visit_Dict = _built


def _call(name: str, *args, lineno: int) -> jinja2.nodes.Filter:
    """Return a call of one of our functions, which no template can name."""
    first, *rest = args or (jinja2.nodes.Const(None, lineno=lineno),)
    return jinja2.nodes.Filter(first, name, list(rest), [], None, None, lineno=lineno)


# These take the context so that the compiler does not compute them once, as constants.
@jinja2.pass_context
def _step(context, _) -> None:
    _BUDGET.get().step()


@jinja2.pass_context
def _concat(context, parts: list[Any]) -> str:
    _BUDGET.get().checked(parts)
    return "".join(map(str, parts))


@jinja2.pass_context
def _built(context, value: Any) -> Any:
    _BUDGET.get().checked(value)
    return value


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of transformers' templates, counted."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source, name, filename):
        return _Count().visit(super()._parse(source, name, filename))

    def call_binop(self, context, operator, left, right):
        def compute():
            return super(_Sandbox, self).call_binop(context, operator, left, right)

        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * abs(right) > BITS:
            raise LimitError("an integer becomes too large")
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        operands = [left, right] if operator == "*" and not numbers else [1]
        return _operate(compute, operands, form=left if operator == "%" else None)

    def call(__self, __context, __obj, *args, **kwargs):
        owner = getattr(inspect.unwrap(__obj) if callable(__obj) else __obj, "__self__", None)
        operands = [owner, *args, *kwargs.values()]
        form = owner if getattr(__obj, "__name__", "").startswith("format") else None

        def compute():
            return super(_Sandbox, __self).call(__context, __obj, *args, **kwargs)

        return _operate(compute, operands, form=form)


class _Generation(jinja2.ext.Extension):
    """The blocks `{% generation %}` around the assistant's words, which are ignored."""

    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


class _Namespace(jinja2.utils.Namespace):
    """A namespace none of whose attributes begins with an underscore."""

    def __init__(*args, **kwargs):  # one of the attributes may be called self
        self, *args = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no attribute {name!r}")
        super().__setitem__(name, value)

    def __repr__(self):  # without the content, which may be large
        return "<namespace>"


def _put_out(value: Any) -> Any:
    _BUDGET.get().put_out(value)
    return value


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _make_sandbox() -> _Sandbox:
    sandbox = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, finalize=_put_out,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )  # fmt: skip
    filters = sandbox.filters | {"tojson": _to_json}
    sandbox.filters = {name: _limited(name, function) for name, function in filters.items()}
    sandbox.filters |= {"_step": _step, "_concat": _concat, "_built": _built}
    del sandbox.globals["lipsum"]
    sandbox.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
    }
    return sandbox


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    return _make_sandbox().from_string(source)


def render(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """Return the text of a chat.

    Args:
      source: The template's source.
      messages: The messages of the chat, plain values.
      **variables: Further variables of the template, such as the special tokens by name.

    Raises:
      ValueError: The template is invalid, raises an exception, or exceeds the limits.
    """
    if len(source) > SOURCE:
        raise ValueError(f"it has {len(source):,} characters, more than {SOURCE:,}")
    weight = weigh(messages, 10**9)
    steps = 4 * PRODUCT // max(len(source), 1000)  # bounds the output of its own text
    budget = Budget(steps, WEIGHT + 8 * weight, WEIGHT + 2 * weight, time.monotonic() + SECONDS)
    token = _BUDGET.set(budget)
    defaults = {"tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return _compiled(source).render(**defaults | variables, messages=messages)
    except LimitError:
        raise
    except RecursionError:
        raise LimitError("it calls itself without end") from None
    except Exception as error:  # a template can raise anything
        raise ValueError(str(error).split("\n")[0][:200] or type(error).__name__) from error
    finally:
        _BUDGET.reset(token)
