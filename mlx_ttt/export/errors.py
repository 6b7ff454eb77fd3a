"""What other libraries say of a failure, in one line."""

from __future__ import annotations

from ..checkpoint.untrusted import quoted


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class if it has none."""
    return quoted((str(error).strip() or type(error).__name__).splitlines()[0])
