"""A CSV file as a table: how it is encoded and delimited, its header, and its rows, one at a time.

`csv_summary` reads through it. Whatever the file holds, no more than a line of it is in memory; what is no table raises
`NotATable`.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from typing import IO

MAX_LINE = 1024 * 1024
"""Characters of one line."""
MAX_COLUMNS = 200
MAX_NAME = 100
PIECE = 256 * 1024
SAMPLE = 2048
"""Characters from which the delimiter is guessed; the time that takes can grow with their square."""

DELIMITERS = ",;\t|"
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class NotATable(ValueError):
    """The file is no CSV table; the message says why, and where."""


class Table:
    """A CSV file, open for one reading.

    :param file: at any position; it is read through once to find the encoding.
    :raises NotATable: where there is no header that could be one.
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
        """How many bytes of the file have been read."""
        return self._file.tell()

    def rows(self) -> Iterator[list[str]]:
        """Yield the rows below the header, each as long as the header. Empty lines are left out.

        :raises NotATable: for a row with more fields than the header, and for text that is not CSV.
        """
        width = len(self.columns)
        for row in self._rows:
            if any(row[width:]):
                raise NotATable(
                    f"Line {self._reader.line_num} has {len(row)} fields, and the first row, which names the columns, {width}."
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
                f"Below line {self._reader.line_num} the text is not valid in {self.encoding}. Save the file as UTF-8."
            ) from None


class _Text(io.TextIOWrapper):
    """Text over a file that stays open when the text is forgotten."""

    def __del__(self) -> None:
        try:
            self.detach()
        except ValueError:
            pass


def find_encoding(file: IO[bytes]) -> str:
    """Return the encoding of a text: what its byte order mark says, UTF-8 where all of it is, else Windows-1252.

    :raises NotATable: for an empty file, and for one with NUL bytes, which no text in these encodings has.
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
            raise NotATable("The file holds NUL bytes, so it is not text: a spreadsheet must be exported as CSV first.")
        following = file.read(PIECE)
        if encoding == "utf-8":
            try:
                decoder.decode(piece, final=not following)
            except UnicodeError:
                encoding = "cp1252"
        piece = following
    return encoding


def find_delimiter(sample: str) -> str:
    """Return what separates the fields: as :class:`csv.Sniffer` guesses it, where the first line bears it out.

    A table with one column has none; a comma does for it.
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
    """Yield the lines of a text. Unlike the text itself, this reads no endless line."""
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise NotATable(f"Line {number} has over {MAX_LINE} characters.")
        if "\x00" in line:
            raise NotATable(f"Line {number} holds a NUL character, so the file is not text.")
        yield line


def _names(row: list[str]) -> list[str]:
    """Return a name for each column: what the first row says, made unique."""
    if not any(name.strip() for name in row):
        raise NotATable("The file has no first row to name the columns.")
    if len(row) > MAX_COLUMNS:
        raise NotATable(f"The first row has {len(row)} fields; at most {MAX_COLUMNS} columns are taken.")
    if row[0].lstrip().startswith(("<", "{", "[")):
        raise NotATable(f"The file begins with {row[0].strip()[:20]!r}: that looks like HTML, XML or JSON.")
    names: list[str] = []
    for number, given in enumerate(row, 1):
        name = base = given.strip()[:MAX_NAME] or f"column {number}"
        count = 1
        while name in names:
            count += 1
            name = f"{base} ({count})"
        names.append(name)
    return names
