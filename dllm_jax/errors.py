"""Mistakes of the user (bad configuration, bad input, a broken checkpoint folder) and faults of the machine."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_ERRNO = re.compile(r"\(os error (\d+)\)|\[os_error_code='(\d+)'\]")  # of safetensors, of TensorStore


class UsageError(ValueError):
    """Something the user gave is wrong; the message is one line that names the field, what was expected and what came.

    Command lines print it as `error: ...` and exit with code 2.
    """


class Stopped(Exception):  # noqa: N818 - an end that was asked for, no error
    """The job was asked to end before it is finished, and did; the message says how to go on.

    Command lines print it as it is and exit with code 0.
    """


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Makes faults of the machine in the block OSErrors that name a file, however the library inside tells them.

    Args:
        path: the file or folder that the block works on, named where the error names none.

    Raises:
        OSError: with errno and filename.
    """
    try:
        yield
    except UsageError:
        raise
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        if not (match := _ERRNO.search(str(error))):
            raise
        number = int(match[1] or match[2])
        raise OSError(number, os.strerror(number), str(path)) from error
