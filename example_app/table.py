"""Reads a CSV file as a table: detects encoding and delimiter, and yields rows one at a time.

At most one line is in memory, whatever the file contains.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from typing import IO

MAX_LINE = 1024 * 1024
"""Maximum characters per line."""
MAX_COLUMNS = 200
MAX_NAME = 100
PIECE = 256 * 1024
SAMPLE = 2048
"""Characters from which the delimiter is guessed. The time can grow with their square."""

DELIMITERS = ",;\t|"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NotATable(ValueError):
    """The file is not a CSV table. The message says why and in which line."""


class Table:
    """A CSV file that can be read once.

    :param file: at any position. It is read completely once to detect the encoding.
    :raises NotATable: if the file is not text or has no valid header.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        self.encoding = find_encoding(file)
        self.delimiter = find_delimiter(self._open("replace").read(SAMPLE))
        self._reader = csv.reader(_lines(self._open()), delimiter=self.delimiter, strict=True)
        self._rows = self._read()
        self.columns = _names(next(self._rows, []))

    @property
    def position(self) -> int:
        """Number of bytes read so far."""
        return self._file.tell()

    def rows(self) -> Iterator[list[str]]:
        """Yield the rows below the header, padded to its length. Skip empty lines.

        :raises NotATable: if a row has more fields than the header, or if the text is not CSV.
        """
        width = len(self.columns)
        for row in self._rows:
            if any(row[width:]):
                raise NotATable(
                    f"Line {self._reader.line_num} has {len(row)} fields, but the header has "
                    f"{width}."
                )
            yield row[:width] + [""] * (width - len(row))

    def _open(self, errors: str = "strict") -> io.TextIOWrapper:
        self._file.seek(0)
        return _Text(self._file, self.encoding, errors, newline="")

    def _read(self) -> Iterator[list[str]]:
        try:
            for row in self._reader:
                if row:
                    yield row
        except csv.Error as error:
            raise NotATable(f"Line {self._reader.line_num} is not CSV: {error}.") from None
        except UnicodeError:
            raise NotATable(
                f"After line {self._reader.line_num} the text is not valid {self.encoding}. "
                "Save the file as UTF-8."
            ) from None


class _Text(io.TextIOWrapper):
    """A text wrapper that does not close its file when it is garbage-collected."""

    def __del__(self) -> None:
        try:
            self.detach()
        except ValueError:
            pass


def find_encoding(file: IO[bytes]) -> str:
    """Return the encoding of a text: as its byte order mark says, else UTF-8 if the text is valid
    UTF-8, else Windows-1252.

    :raises NotATable: if the file is empty, or contains NUL bytes without a byte order mark.
    """
    file.seek(0)
    piece = file.read(PIECE)
    if not piece:
        raise NotATable("The file is empty.")
    for mark, encoding in _MARKS:
        if piece.startswith(mark):
            return encoding
    decoder = codecs.getincrementaldecoder("utf-8")()
    encoding = "utf-8"
    while piece:
        if b"\x00" in piece:
            raise NotATable(
                "The file contains NUL bytes, so it is not text. Export a spreadsheet as CSV first."
            )
        following = file.read(PIECE)
        if encoding == "utf-8":
            try:
                decoder.decode(piece, final=not following)
            except UnicodeError:
                encoding = "cp1252"
        piece = following
    return encoding


def find_delimiter(sample: str) -> str:
    """Return the delimiter that :class:`csv.Sniffer` guesses, if the first line contains it; else
    the most frequent delimiter of the first line. For a single column it is a comma.
    """
    header = next((line for line in sample.splitlines() if line.strip()), "")
    try:
        guess = csv.Sniffer().sniff(sample, DELIMITERS).delimiter
    except csv.Error:
        guess = ""
    if guess and guess in header:
        return guess
    return max(DELIMITERS, key=header.count)


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    """Yield the lines of a text. Unlike iterating over the text, this limits their length."""
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise NotATable(f"Line {number} has over {MAX_LINE} characters.")
        if "\x00" in line:
            raise NotATable(f"Line {number} contains a NUL character, so the file is not text.")
        yield line


def _names(row: list[str]) -> list[str]:
    """Return a unique name for each column from the first row."""
    if not any(name.strip() for name in row):
        raise NotATable("The file has no header with the names of the columns.")
    if len(row) > MAX_COLUMNS:
        raise NotATable(f"The header has {len(row)} fields; use at most {MAX_COLUMNS} columns.")
    if row[0].lstrip().startswith(("<", "{", "[")):
        raise NotATable(
            f"The file begins with {row[0].strip()[:20]!r}, which looks like HTML, XML or JSON."
        )
    names: list[str] = []
    for number, field in enumerate(row, 1):
        name = base = field.strip()[:MAX_NAME] or f"column {number}"
        count = 1
        while name in names:
            count += 1
            name = f"{base} ({count})"
        names.append(name)
    return names
