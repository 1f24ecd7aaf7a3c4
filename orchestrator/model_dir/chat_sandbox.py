"""Owns the Jinja environment that chat templates run in: transformers' extensions and names, within bounds.

Every turn of a loop and every call looks at the deadline of the render, and no operator makes more than a prompt may
hold. That stops what a client's conversation could make of an honest template, and most of what a hostile one could
do; a filter that is told to pad to some width is stopped only by the memory there is.
"""

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_PROMPT_CHARACTERS = 2**24
MAX_RENDER_S = 1.0
# The variable with the time.monotonic() of a render's end: no name that a template could write.
DEADLINE = "the deadline"
_MAX_BITS = 4096


def compile_template(source: str, *, now: Callable[[], datetime]) -> Template:
    """Compiles a template, which is to be rendered with ``DEADLINE`` among its variables.

    Args:
        now: the clock of ``strftime_now``.

    Raises:
        Exception: of any kind; jinja2.TemplateSyntaxError where Jinja itself refuses it.
    """
    environment = _Sandbox(now)
    code = environment.compile(_Bounding().visit(environment.parse(source)))
    return Template.from_code(environment, code, environment.make_globals(None))


def variables_of(source: str) -> set[str]:
    """Returns the variables that a template reads and does not set itself. Raises as ``compile_template`` does."""
    return meta.find_undeclared_variables(_Sandbox(datetime.now).parse(source))


def check_size(num_characters: int) -> None:
    """Raises TemplateRuntimeError for more than a prompt may hold."""
    if num_characters > MAX_PROMPT_CHARACTERS:
        raise TemplateRuntimeError(f"it writes more than {MAX_PROMPT_CHARACTERS} characters")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        # Not optimized: what a template computes it computes within a render's bounds, never while it is compiled.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: now().strftime(format)
        self.globals["dict"] = lambda *args, **values: dict(*args, **values)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def call(self, context: Context, callee: Any, /, *args: Any, **values: Any) -> Any:
        if time.monotonic() > context.parent[DEADLINE]:
            raise TemplateRuntimeError(f"it takes longer than {MAX_RENDER_S:g} s")
        return super().call(context, callee, *args, **values)

    def tick(self) -> None:
        """Is called in each turn of a loop, so that the call looks at the deadline."""

    def join_texts(self, *values: object) -> str:
        """Computes the operator ``~``."""
        texts = [str(value) for value in values]
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            check_size(len(left) + len(right))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    check_size(len(one) * other)
        elif operator == "**":
            _check_power(left, right)
        return super().call_binop(context, operator, left, right)


def _check_power(base: object, exponent: object) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _MAX_BITS:
        raise TemplateRuntimeError("it computes too large a number")


class _Bounding(NodeTransformer):
    """Keeps loops and the operator ``~`` within the bounds of :class:`_Sandbox`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_own("tick", []), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _own("join_texts", node.nodes)


def _own(method: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)


class _Generation(Extension):
    """Reads ``{% generation %}``, which marks for training what an assistant said, up to ``{% endgeneration %}``."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Namespace(Namespace):
    """Is ``namespace(...)``. Its attributes must not begin with an underscore, as Python's own do."""

    def __init__(*args: Any, **values: Any) -> None:  # so that ``self`` may be the name of an attribute
        attributes = dict(*args[1:], **values)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON without the HTML escapes of Jinja's own filter, as models were trained without them."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
