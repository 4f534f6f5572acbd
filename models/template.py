"""Chat templates come out of model files, from anywhere. They run in Jinja's sandbox, which keeps them from the
machine, and on a budget, which keeps them from its time and memory.

Whatever a template does is paid for: a loop for all its rounds times what stands in its body, before it begins; a macro
or block for its body; every operation, call, filter, comparison and output for the size of what goes in and comes out.
Values are measured with all that they hold, so one list named a thousand times counts a thousand times. What can make
much out of little (`*`, `**`, replace, join, indent) is computed before it is done, or not there at all: filters and
methods are those that chat templates use and that take linear time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from protocol.errors import RequestError

STEPS = 2_000_000
"""What a template may cost beside its part for the messages; common ones cost some thousand for a short chat."""

_LETTERS = 4  # of text, for one step
_BITS = 4096  # of an integer
_INDENT = 16  # of JSON
_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent",
    "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
    "wordcount",
)  # fmt: skip
_METHODS = {
    "capitalize", "casefold", "count", "endswith", "find", "get", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle",
    "isupper", "items", "join", "keys", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith",
    "strip", "swapcase", "title", "upper", "values",
}  # of text, lists and mappings; encode and format lead to more of them  # fmt: skip
_PRODUCTS = {"strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"}  # time: both lengths multiplied
_COMPARISONS = (
    "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le",
    "in", "lower", "upper",
)  # fmt: skip
_OURS = (BlockReference, Cycler, Joiner, LoopContext, Macro)
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_left: ContextVar[list[int]] = ContextVar("_left")  # steps of the rendering that goes on


def make_environment() -> jinja2.Environment:
    return _Environment()


@contextmanager
def steps(count: int) -> Iterator[None]:
    """Within it templates are compiled and rendered; beyond `count` steps they fail with RequestError."""
    token = _left.set([count])
    try:
        yield
    finally:
        _left.reset(token)


def _pay(count: int) -> None:
    left = _left.get()
    left[0] -= count
    if left[0] < 0:
        raise RequestError(
            "the model's chat template makes too much of the messages: send less, or take another model", "messages"
        )


def _measure(*values: Any) -> None:
    """Pays for values and for all that they hold."""
    waiting: list[Any] = list(values)
    limit, cost = _left.get()[0], 0
    while waiting and cost <= limit:
        value = waiting.pop()
        if isinstance(value, str):
            cost += 1 + len(value) // _LETTERS
        elif isinstance(value, int):
            cost += 1
            _check_bits(value.bit_length())
        elif isinstance(value, (list, tuple)) or type(value) in _VIEWS:
            cost += 1 + len(value)
            waiting.extend(value)
        elif isinstance(value, dict):
            cost += 1 + 2 * len(value)
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, Namespace):
            cost += 4
            waiting.append(object.__getattribute__(value, "_Namespace__attrs"))
        else:
            cost += 1 + len(value) if isinstance(value, range) else 1
    _pay(cost)


def _measured(value: Any) -> Any:
    _measure(value)
    return value


def _check_bits(count: int) -> None:
    if count > _BITS:
        raise RequestError("the model's chat template computes with absurd numbers: take another model", "messages")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_measured)
        self.filters = {name: _paying(name, self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = _tojson
        self.filters |= {f" {hook.__name__}": hook for hook in (_iterations, _body, _value, _concat)}
        compared: dict[str, Any] = {name: self.tests[name] for name in _COMPARISONS}
        self.tests.update({name: _paying(name, test) for name, test in compared.items()})
        del self.globals["lipsum"]

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # what a template, block or macro wrote
        return "".join(map(_measured, parts))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _measure(args, kwargs)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if owner is None or isinstance(owner, _OURS):
            return super().call(__context, __obj, *args, **kwargs)
        if method.__name__ not in _METHODS:
            raise SecurityError(f"{method.__name__} is not for chat templates")
        _measure(owner)
        args = _foreseen(method.__name__, owner, args)
        return _measured(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _measure(left, right)
        if operator == "*":
            _pay(_times(left, right) + _times(right, left))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            raise TypeError("text has no operator % in chat templates")
        return _measured(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Metered(self).visit(source), *args, **kwargs)


def _times(sequence: Any, count: Any) -> int:
    return len(sequence) * max(0, count) if isinstance(sequence, Sequence) and isinstance(count, int) else 0


def _foreseen(name: str, owner: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pays for what a method or filter is going to make. Its arguments, those that can be read but once as lists."""
    if not (isinstance(owner, str) and args):
        return args
    if name == "join":
        parts = list(args[0])
        _measure(parts)
        _pay(len(owner) * len(parts))
        return (parts, *args[1:])
    if name == "replace" and len(args) > 1:
        _pay(owner.count(str(args[0])) * len(str(args[1])) // _LETTERS)
    elif name == "indent":
        width = args[0] if isinstance(args[0], int) else len(str(args[0]))
        _pay((1 + len(owner.splitlines())) * max(0, width) // _LETTERS)
    elif name in _PRODUCTS and isinstance(args[0], str):
        _pay(len(owner) * len(args[0]) // 64)
    return args


def _paying(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test of Jinja's that pays. Jinja passes some of them its context, or such, first."""
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:
        first, (value, *more) = args[:passed], args[passed:]
        before = _left.get()[0]
        _measure(more, kwargs)
        each = before - _left.get()[0]
        _measure(value)
        if name == "join":
            value = list(value)
            _foreseen(name, str((more or [kwargs.get("d", "")])[0]), (value,))
        else:
            by_name = [kwargs[key] for key in ("old", "new", "width", "chars") if key in kwargs]
            _foreseen("strip" if name == "trim" else name, value, (*more, *by_name))
        result = function(*first, value, *more, **kwargs)
        return _counted(result, each) if isinstance(result, Iterator) else _measured(result)

    return paying


def _counted(items: Iterable[Any], each: int) -> Iterator[Any]:
    for item in items:
        _pay(each)
        yield _measured(item)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own would escape for HTML."""
    if indent is not None and not 0 <= indent <= _INDENT:
        raise ValueError(f"tojson: an indent of {indent}")
    _measure(value)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )  # iterencode works piece by piece
    return "".join(map(_measured, encoder.iterencode(value)))


# What _Metered puts into templates. Given the context, they are not computed ahead when a template is compiled.


@pass_context
def _iterations(context: Context, items: Any, body: int) -> Any:
    """What a loop goes through; `body` is paid for each of it."""
    try:
        _pay(len(items) * body)
    except TypeError:
        return _counted(items, body)
    return items


@pass_context
def _body(context: Context, size: int) -> None:
    _pay(size)


@pass_context
def _value(context: Context, value: Any) -> Any:
    return _measured(value)


@pass_context
def _concat(context: Context, values: tuple[Any, ...]) -> str:
    _measure(values)
    return "".join(map(str, values))


class _Metered(NodeTransformer):
    """Puts a filter wherever a template could work without asking its environment. No template can name those."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise jinja2.TemplateAssertionError("recursive loops are not for chat templates", node.lineno)
        body = _size(node)
        self.generic_visit(node)
        node.iter = self._through(_iterations, node.iter, nodes.Const(body))
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:
        count = nodes.Const(_size(node))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._through(_body, count), lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through(_concat, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Equality to a constant takes no time, but to look for one in a long text does."""
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        by_constant = any(isinstance(side, nodes.Const) for side in sides)
        if not (len(sides) == 2 and by_constant and node.ops[0].op in ("eq", "ne")):
            node.expr = self._through(_value, node.expr)
            for operand in node.ops:
                operand.expr = self._through(_value, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return self._through(_value, node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = self._through(_value, node.arg)
        return node

    def visit_Tuple(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        if not stored:
            node = self._through(_value, node)
        return node  # type: ignore[no-any-return]

    visit_List = visit_Dict = visit_Tuple

    def _through(self, hook: Callable[..., Any], value: Any, *args: nodes.Expr) -> nodes.Filter:
        made = nodes.Filter(value, f" {hook.__name__}", list(args), [], None, None, lineno=value.lineno)
        made.set_environment(self._environment)
        return made


def _size(node: nodes.Node) -> int:
    return 1 + sum(1 for _ in node.find_all(nodes.Node))
