"""Where the tokens of a canvas stand in lines of characters: the same place at every step, whatever is masked."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

TAB = 4  # columns
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\N{SYMBOL FOR DELETE}"}
_JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # parts of emoji and of scripts


class Part(NamedTuple):
    """A token, or the part of one that is on one line."""

    place: int  # position of the token
    text: str  # what is seen of the final token
    begins: bool  # the first part of its token
    ends: bool


def printable(text: str) -> str:
    """Text without what moves a cursor, hides or reorders other text: such characters become visible signs."""
    expanded = text.replace("\t", " " * TAB).translate(_CONTROLS)
    hides = {c for c in expanded if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in _JOINERS}
    return "".join("\N{REPLACEMENT CHARACTER}" if c in hides else c for c in expanded)


def lines(texts: Sequence[str], *, width: int) -> list[list[Part]]:
    """The tokens in lines, broken at line breaks and before words that do not fit.

    Args:
        texts: of every token.
        width: of a line in columns, at least 1.
    """
    found: list[list[Part]] = [[]]
    used = 0
    starts = [place for place, text in enumerate(texts) if place == 0 or not text or text[0].isspace()]
    for first, behind in zip(starts, [*starts[1:], len(texts)], strict=True):
        shown = list(texts[first:behind])
        word = sum(cell_len(printable(text.partition("\n")[0])) for text in shown)
        if used and used + word > width >= word:
            if shown[0] == " " and used < width:  # it stays behind
                found[-1].append(Part(first, " ", begins=False, ends=False))
                first, shown = first + 1, shown[1:]
            found.append([])
            used = 0
            if shown and shown[0][:1] == " " != shown[0]:
                shown[0] = shown[0][1:]
        for place, text in enumerate(shown, start=first):
            for at, piece in enumerate(_pieces(text)):
                if at:
                    found.append([])
                    used = 0
                for part in _chopped(printable(piece), width=width):
                    if used and used + cell_len(part) > width:
                        found.append([])
                        used = 0
                    found[-1].append(Part(place, part, begins=False, ends=False))
                    used += cell_len(part)
    return _with_ends(found)


def fitted(text: str, part: Part) -> str:
    """Another text in the place of a part: cut or filled up to its width."""
    return set_cell_size(printable(text.replace("\n", "↵")), cell_len(part.text))


def _pieces(text: str) -> list[str]:
    """A token's lines, with a sign where each but the last ends; one that shows nothing still has a place."""
    head, *rest = text.replace("\r\n", "\n").split("\n")
    pieces = [head, *rest]
    marked = [f"{piece}↵" for piece in pieces[:-1]] + pieces[-1:]
    return marked if text else [" "]


def _chopped(text: str, *, width: int) -> list[str]:
    """A text in parts of a line's width at most."""
    parts = [""]
    for character in text:
        if parts[-1] and cell_len(parts[-1] + character) > width:
            parts.append("")
        parts[-1] += character
    return parts


def _with_ends(found: list[list[Part]]) -> list[list[Part]]:
    """The lines, with the first and last part of every token marked."""
    places = [part.place for line in found for part in line]
    first = {place: i for i, place in reversed(list(enumerate(places)))}
    last = {place: i for i, place in enumerate(places)}
    counted = iter(range(len(places)))
    return [
        [part._replace(begins=first[part.place] == (i := next(counted)), ends=last[part.place] == i) for part in line]
        for line in found
    ]
