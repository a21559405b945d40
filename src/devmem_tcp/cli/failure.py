"""How a command ends badly: one line, one hint, an exit status; never a traceback for a user's mistake."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import IO, Any, Final

import click

from devmem_tcp.errors import BackendFallbackWarning, BackendUnavailable, DevmemError, StarvationWarning
from devmem_tcp.types import Severity

EXIT_FAILED: Final = 1
EXIT_MISMATCH: Final = 3
_PEER_GONE: Final = frozenset(
    (
        errno.EPIPE,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ENOTCONN,  # shutdown(2) after a reset
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    )
)
_SIGNALLED: Final = 128  # a shell's status for "ended by signal n" is 128 + n
EXIT_STATUS_HELP: Final = (
    "Exit status: 0 all is well; 1 it failed; 2 wrong usage; 3 the payload is not what --verify expects; "
    "130 interrupted (Ctrl-C); 141 the reader of standard output went away; 143 terminated."
)


class VerificationFailed(DevmemError):
    """The payload is not what was expected."""


class OutputClosed(Exception):
    """The reader of standard output went away: no error, but the end."""


class Failure(click.ClickException):
    """An error as the user sees it: ``devmem-tcp: error: …`` and ``hint: …`` on stderr."""

    def __init__(self, message: str, hints: list[str], exit_code: int) -> None:
        super().__init__(message)
        self.hints = hints
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance, and declares it a constant

    def show(self, file: IO[Any] | None = None) -> None:
        say(f"error: {self.message}")
        for hint in self.hints:
            click.echo(f"hint: {hint}", err=True)


def peer_is_gone(error: OSError) -> bool:
    """Whether an error of a connected socket says that the connection broke."""
    return error.errno in _PEER_GONE


def say(text: str) -> None:
    """Print one line of this program's own on stderr."""
    click.echo(f"devmem-tcp: {text}", err=True)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn what the library raises into a message and an exit status, and its warnings into lines on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", BackendFallbackWarning)
        warnings.simplefilter("always", StarvationWarning)
        warnings.showwarning = _show_warning
        try:
            yield
        except OutputClosed:
            raise click.exceptions.Exit(_SIGNALLED + signal.SIGPIPE) from None
        except BrokenPipeError:  # of a socket it is a DevmemError by now: this is standard output
            _abandon_stdout()
            raise click.exceptions.Exit(_SIGNALLED + signal.SIGPIPE) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise click.exceptions.Exit(_SIGNALLED + signal.SIGINT) from None
        except (DevmemError, OSError, ValueError) as error:
            raise failure_of(error) from error


def failure_of(error: Exception) -> Failure:
    """Return what to tell the user about an error, and the exit status."""
    hints = [note.removeprefix("hint: ") for note in getattr(error, "__notes__", ())]
    if isinstance(error, DevmemError):
        message = error.message
        hints = [error.hint, *hints] if error.hint else hints
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        message = str(error) or type(error).__name__
    if isinstance(error, BackendUnavailable):
        errors = [check for check in error.report.checks if check.severity is Severity.ERROR]
        hints = [check.fix.removeprefix("# ") for check in errors if check.fix]
        hints.append("--backend software runs anywhere, over ordinary TCP")
    status = EXIT_MISMATCH if isinstance(error, VerificationFailed) else EXIT_FAILED
    return Failure(message, list(dict.fromkeys(hints)), status)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    say(f"warning: {message}")


def _abandon_stdout() -> None:
    """Send what is still buffered for stdout nowhere, so that closing it at exit is quiet."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def end_on_signals() -> None:
    """Make SIGTERM and SIGHUP unwind the program as Ctrl-C does, so that everything is closed and put back."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup, which ignores SIGHUP
            signal.signal(number, _end)


def unwind_on_interrupt() -> None:
    """Make Ctrl-C unwind the program from here on, since there may be something to close: see ``devmem_tcp_main``."""
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(_SIGNALLED + number)
