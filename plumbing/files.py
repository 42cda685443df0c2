"""Files that are whole or not there."""

import os
from contextlib import contextmanager

from plumbing import fail


@contextmanager
def writing(what):
    """A full disk, a folder that cannot be written: one line, and nothing half-written stays.

    what: the path, whose temporary name is `what`.tmp, or words that say what is being written. A mistake in the body
    is no such thing and keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # torch raises over it
        if not isinstance(reason, OSError) and "(os error" not in str(reason):  # as libraries in Rust say it
            raise
        if os.path.isfile(f"{what}.tmp"):
            os.remove(f"{what}.tmp")
        fail(f"cannot write {what}: {(str(reason) or repr(reason)).splitlines()[0]}")


def write_text(path, text):
    """Under a temporary name, then renamed."""
    with writing(path):
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{path}.tmp", path)
