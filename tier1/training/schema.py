"""The schema of a training record (pandera); the name of a failed check is the reason that is written down.

A module of its own because importing pandera takes a second, which only validation needs.
"""

from __future__ import annotations

import pandera.pandas as pa
from pandera.typing import Series

MAX_TEXT_CHARS = 1_000_000


class TextRecord(pa.DataFrameModel):
    """One record as read: where it stands and what it says."""

    file: Series[str]
    line: Series[int] = pa.Field(ge=1)
    text: Series[str]

    class Config:
        """Unknown columns are refused."""

        strict = True

    @pa.check("text", name="text_is_blank")
    def _is_not_blank(cls, text: Series[str]) -> Series[bool]:
        return text.str.strip().str.len() > 0

    @pa.check("text", name=f"text_is_longer_than_{MAX_TEXT_CHARS}_characters")
    def _is_not_too_long(cls, text: Series[str]) -> Series[bool]:
        return text.str.len() <= MAX_TEXT_CHARS

    @pa.check("text", name="text_has_control_characters")
    def _has_no_control_characters(cls, text: Series[str]) -> Series[bool]:
        # NUL and its kin mean a binary file that happens to parse; tab and line breaks are text.
        return ~text.str.contains(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", regex=True)
