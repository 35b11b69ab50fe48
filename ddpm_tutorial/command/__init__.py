"""The command line: ``ddpm-tutorial train``, ``sample`` and ``evaluate`` (chapters 5, 6 and 8).

Exit status: 0 done, 1 failed while running, 2 bad input (one line says what), 129, 130 or 143 stopped by a signal.
"""

import contextlib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read when torch is imported; no effect off Apple's MPS

from .arguments import build_parser

TOO_LARGE = ("out of memory", "can't allocate memory", "Overflow", "overflow")  # torch's RuntimeErrors say


def main(argv: Sequence[str] | None = None) -> int:
    command = None
    with contextlib.redirect_stdout(Steady(sys.stdout)), contextlib.redirect_stderr(Steady(sys.stderr)):
        try:
            args = vars(build_parser().parse_args(argv))
            command = args.pop("command")
            with _ctrl_c_ends_at_once():  # torch takes seconds to import: only once the options are read and checked
                module = importlib.import_module(f".{command}", __package__)
            return module.run(**args)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except (ValueError, OSError) as error:  # ConnectionError and FileNotFoundError are OSErrors
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            return _fail(command, error, 1 if full else getattr(error, "exit_status", 2))
        except (FloatingPointError, OverflowError, MemoryError) as error:
            return _fail(command, error, 1)
        except RuntimeError as error:
            if not any(text in str(error) for text in TOO_LARGE):
                raise
            return _fail(command, error, 1)


def _fail(command: str, error: Exception, status: int) -> int:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    print(f"ddpm-tutorial {command}: error: {reason}", file=sys.stderr)
    return status


class Steady:
    """A standard stream that ends no run: without some of its characters where its encoding lacks them, and silent
    where it does not exist, was closed, or can take no more."""

    def __init__(self, stream):
        self.stream = stream
        if stream is None:
            self._give_up()
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (AttributeError, OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Nothing is kept: each ``write`` flushes."""

    def _give_up(self) -> None:
        nowhere = open(os.devnull, "w", encoding="utf-8")
        with contextlib.suppress(AttributeError, OSError, ValueError):
            os.dup2(nowhere.fileno(), self.stream.fileno())  # for what it still holds, which Python writes at its end
        self.stream = nowhere

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def _ctrl_c_ends_at_once() -> Iterator[None]:
    """For imports: nothing is written yet, and a KeyboardInterrupt within them may come out as another error."""
    before = signal.signal(signal.SIGINT, lambda number, _frame: os._exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
