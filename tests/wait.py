"""Waiting for something that other processes do."""

import time
from collections.abc import Callable


def wait_until(happened: Callable[[], object], what: str, seconds: float = 30) -> None:
    """Return once `happened()` is true; fail when it takes too long.

    Parameters
    ----------
    what :
        What is waited for, as a sentence for the error message.

    Raises
    ------
    TimeoutError
        It did not happen in time.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited for {seconds:g} s in vain until: {what}")
        time.sleep(0.02)
