"""Text that users and models wrote, fit for HTML and XML. Escaping is left to what writes those."""

from __future__ import annotations

import re

# XML 1.0, production 2, has no others; in HTML, too, they are errors. Lone surrogates are no text in any encoding.
_INVISIBLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LONGEST = 2000  # characters of one prompt or answer that are shown


def visible(text: str) -> str:
    """``text``, each character that XML may not hold as U+FFFD."""
    return _INVISIBLE.sub("\ufffd", text)


def shorten(text: str, longest: int = LONGEST) -> str:
    """The beginning of a text that is longer than it should be, and how much is left out."""
    left_out = len(text) - longest
    return text if left_out <= 0 else f"{text[:longest]}… ({left_out} more characters)"
