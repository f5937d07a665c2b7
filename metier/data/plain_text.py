"""Plain text and Markdown -> passages for training on text.

A file is cut at blank lines (Markdown also before headings) and its paragraphs are joined to passages of at most
`data.passage_chars` characters; a longer paragraph is cut after a sentence, or else where it is full. Nothing is left
out but the blank lines between passages. A passage's group is its file, so that no document stands in two splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from metier.data.lines import Line, Row, Source, read_lines

COLUMNS = ["text", "document"]
_HEADING = re.compile(r"#{1,6} ")
_FENCE = re.compile(r"\s*(```|~~~)")
_SENTENCE_END = re.compile(r"[。!?\uff01\uff1f\uff1b]|\. |\n")


def read_text(source: Source) -> Iterator[Row]:
    """The passages of a file, each with the line and byte where it begins."""
    number = 0
    for lines in _passages(source):
        first = lines[0]
        last = next(line for line in reversed(lines) if line.text.strip())
        place = f"line {first.number}" if first.number == last.number else f"lines {first.number} to {last.number}"
        problem = next((line.problem for line in lines if line.problem), None)
        if problem:
            number += 1
            yield Row(number, first.offset, place, problem=problem)
            continue
        text = "".join(line.text for line in lines).replace("\r\n", "\n").rstrip()
        for piece in _pieces(text, source.passage_chars):
            number += 1
            yield Row(number, first.offset, place, {"text": piece, "document": source.name})


def _passages(source: Source) -> Iterator[list[Line]]:
    """Paragraphs joined while they fit; a Markdown heading begins a new passage once this one is a quarter full."""
    is_markdown = source.format == "text" and source.name.lower().endswith((".md", ".markdown"))
    passage: list[Line] = []
    size = 0
    for paragraph in _paragraphs(source):
        length = sum(len(line.text) for line in paragraph)
        begins = is_markdown and _HEADING.match(paragraph[0].text) and size > source.passage_chars // 4
        if passage and (begins or size + length > source.passage_chars):
            yield passage
            passage, size = [], 0
        passage += paragraph
        size += length
    if passage:
        yield passage


def _paragraphs(source: Source) -> Iterator[list[Line]]:
    """Lines up to and with the blank ones behind them; a fenced block is one. No more lines than fill a passage."""
    paragraph: list[Line] = []
    size = 0
    is_ending = is_fenced = False
    for line in read_lines(source):
        is_blank = not line.text.strip()
        ends = not is_fenced and (is_ending or _HEADING.match(line.text) is not None)
        if paragraph and not is_blank and (ends or size + len(line.text) > source.passage_chars):
            yield paragraph
            paragraph, size = [], 0
        if _FENCE.match(line.text):
            is_fenced = not is_fenced
        if paragraph or not is_blank:
            paragraph.append(line)
            size += len(line.text)
        is_ending = is_blank
    if paragraph:
        yield paragraph


def _pieces(text: str, most: int) -> Iterator[str]:
    """A text cut after sentences, or where it is full."""
    while len(text) > most:
        ends = [match.end() for match in _SENTENCE_END.finditer(text, most // 2, most)]
        cut = ends[-1] if ends else most
        yield text[:cut]
        text = text[cut:]
    if text.strip():
        yield text
