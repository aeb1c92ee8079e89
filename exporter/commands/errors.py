"""The group of commands, which prints every error that a user can act on as one line and exits with its code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from lvlm_edge.exporter.commands.output import visible
from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, nearest

INTERRUPTED = 130  # as a shell has it of a program that SIGINT ended
# The extra of pyproject.toml that brings a module.
EXTRAS = {
    **dict.fromkeys(("google", "huggingface_hub", "ml_dtypes", "onnx", "onnx_ir", "onnxscript"), "export"),
    **dict.fromkeys(("regex", "safetensors", "sentencepiece", "torch", "transformers"), "export"),
    **dict.fromkeys(("modelopt", "requests"), "quantize"),
    "onnxruntime": "ort",
}


class Errors(click.Group):
    """A group that prints every error a user can act on as one line and exits with its code."""

    def main(self, args: Any = None, prog_name: Any = None, *_: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows another, and no traceback
                stream.reconfigure(errors="replace")
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        notices = Notices()
        logging.getLogger("lvlm_edge").addHandler(notices)
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.ClickException as error:
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
                error.show()
            else:
                _report(_usage(error), error.exit_code, sys.argv[1:] if args is None else args)
            code = error.exit_code
        finally:
            logging.getLogger("lvlm_edge").removeHandler(notices)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        given = [*getattr(ctx, "_protected_args", ()), *ctx.args]
        try:
            return super().invoke(ctx)
        except LvlmEdgeError as error:
            _report(str(error), error.exit_code, given)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get(str(error.name).partition(".")[0])
            if extra is None:
                raise
            said = f"{error.name}: is not installed, which this command needs; pip install 'lvlm-edge[{extra}]'"
            _report(said, UnsupportedError.exit_code, given)
            ctx.exit(UnsupportedError.exit_code)
        except KeyboardInterrupt:
            _report("stopped", INTERRUPTED, given)
            ctx.exit(INTERRUPTED)
        except OSError as error:
            where = error.filename or "standard output"
            print_error(f"{where}: cannot be read or written ({error.strerror or error}); see its mode and the disk")
            with contextlib.suppress(OSError, ValueError):  # what Python still holds is not to be written either
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            raise click.UsageError(f"command {args[0]!r} is not known; {nearest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


class Notices(logging.Handler):
    """Prints what a user should know of, one line each, unless `--quiet` is given."""

    def emit(self, record: logging.LogRecord) -> None:
        context = click.get_current_context(silent=True)
        if context is None or not context.params.get("quiet"):
            print_error(record.getMessage())


def _report(message: str, code: int, given: Sequence[str]) -> None:
    """Print an error on stderr and, where `--json` is given, as a document on stdout too."""
    print_error(message)
    if "--json" in given:
        with contextlib.suppress(OSError):
            click.echo(json.dumps({"error": " ".join(message.split()), "exit_code": code}, indent=1))


def print_error(message: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(f"lvlm-edge: {visible(' '.join(message.split()))}", err=True)


def _usage(error: click.ClickException) -> str:
    """An error of the command line itself: which command, what is wrong, where its options are."""
    context = getattr(error, "ctx", None)
    if context is None or context.parent is None:
        return f"{error.format_message().rstrip('.')}; see lvlm-edge --help"
    name = context.command.name
    return f"{name}: {error.format_message().rstrip('.')}; see lvlm-edge {name} --help"
