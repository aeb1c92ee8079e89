"""Chat templates: Jinja, compiled in the environment that transformers renders them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.runtime.errors import BundleError
from lvlm_edge.runtime.prompt.time_limit import TimeLimitError, time_limit

if TYPE_CHECKING:
    from jinja2 import Template


SECONDS = 5.0  # that compiling or rendering may take
LENGTH = 10_000_000  # characters of a rendered prompt, and of any text or list that a template makes by multiplying
EXPONENT = 64  # of powers in templates


def compile_template(source: str, path: Path) -> Template:
    """The chat template, in the environment transformers renders it in.

    Raises:
        BundleError: the template has a syntax error, or takes longer than `SECONDS`.

    Source: `utils/chat_template_utils.py` of transformers 5.23.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for training and means nothing here."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 wants it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Bounded(ImmutableSandboxedEnvironment):
        """Without operators that take forever inside one instruction."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        with time_limit(SECONDS):
            return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        raise BundleError(
            f"{path}: not a chat template ({one_line(error)}), expected a Jinja template; export the bundle again"
        ) from error
    except TimeLimitError as error:
        raise endless(path) from error


def render(template: Template, variables: dict[str, Any]) -> str:
    """The prompt that a template writes.

    Raises:
        TimeLimitError: it takes longer than `SECONDS`.
        Exception: whatever a template raises; MemoryError for one that writes more than `LENGTH` characters.
    """
    pieces, length = [], 0
    with time_limit(SECONDS):
        for piece in template.generate(variables):
            length += len(piece)
            if length > LENGTH:
                raise MemoryError(f"it writes more than {LENGTH} characters")
            pieces.append(piece)
    return "".join(pieces)


def endless(where: object) -> BundleError:
    """What is said of a template that does not end."""
    return BundleError(f"{where}: takes longer than {SECONDS:g} s, expected a chat template; do not use this bundle")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    from jinja2.exceptions import SecurityError

    if operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= EXPONENT):
        raise SecurityError(f"a power of {right!r:.40} is more than {EXPONENT}")
    for many, times in ((left, right), (right, left)) if operator == "*" else ():
        repeats = isinstance(many, (str, list, tuple)) and isinstance(times, int)
        if repeats and len(many) * times > LENGTH:
            raise SecurityError(f"something repeated {times} times has more than {LENGTH} elements")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; the filter of the same name in Jinja escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def one_line(message: object) -> str:
    return " ".join(str(message).split())
