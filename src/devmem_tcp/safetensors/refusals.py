"""What the operating system refuses about a file, as this package's error."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from devmem_tcp.errors import KernelError

_NO_SPACE: Final = "make room on that disk, or write to another"
_HINTS: Final[Mapping[int, str]] = MappingProxyType(
    {
        errno.ENOSPC: _NO_SPACE,
        errno.EDQUOT: "your quota is used up: " + _NO_SPACE,
        errno.EFBIG: "larger than this filesystem, or the limit on file sizes (ulimit -f), allows",
        errno.ELOOP: "it is a symbolic link: name the file that it points to, or remove it",
        errno.EROFS: "that filesystem is mounted read-only: write to another",
    }
)


@contextlib.contextmanager
def refusals(call: str) -> Iterator[None]:
    """Raise an OSError of the block as KernelError; ``call`` is the operation, for people, with the file's name.

    That a name is taken (FileExistsError) is left as it is: what to do about it is the caller's choice.
    """
    try:
        yield
    except (KernelError, FileExistsError):
        raise
    except OSError as error:
        number = error.errno or 0
        raise KernelError(number, call, hint=_HINTS.get(number, "")) from error
