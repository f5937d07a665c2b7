"""A minimal xlsx workbook, written cell by cell as Excel writes it (shared strings aside)."""

from __future__ import annotations

import io
import zipfile
from html import escape

_TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/>'
    '<Override PartName="/xl/workbook.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/></Types>'
)
_RELATIONS = '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{}</Relationships>'
_RELATION = (
    '<Relationship Id="rId{}" Target="{}" '
    'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/{}"/>'
)
_MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
_LINKS = 'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'


def xlsx(sheets: dict[str, list[list[object]]], hidden: tuple[str, ...] = ()) -> bytes:
    """The bytes of a workbook; text is written as text, numbers as numbers, None leaves the cell out."""
    names = list(sheets)
    entries = "".join(
        f'<sheet name="{escape(name)}" sheetId="{k}" r:id="rId{k}"{" state=" + chr(34) + "hidden" + chr(34) if name in hidden else ""}/>'  # noqa: E501
        for k, name in enumerate(names, start=1)
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", _TYPES)
        archive.writestr("_rels/.rels", _RELATIONS.format(_RELATION.format(1, "xl/workbook.xml", "officeDocument")))
        archive.writestr("xl/workbook.xml", f"<workbook {_MAIN} {_LINKS}><sheets>{entries}</sheets></workbook>")
        links = "".join(_RELATION.format(k, f"worksheets/sheet{k}.xml", "worksheet") for k in range(1, len(names) + 1))
        archive.writestr("xl/_rels/workbook.xml.rels", _RELATIONS.format(links))
        for k, rows in enumerate(sheets.values(), start=1):
            archive.writestr(f"xl/worksheets/sheet{k}.xml", _sheet(rows))
    return buffer.getvalue()


def _sheet(rows: list[list[object]]) -> str:
    lines = []
    for r, row in enumerate(rows, start=1):
        cells = "".join(_cell(f"{chr(65 + c)}{r}", value) for c, value in enumerate(row) if value is not None)
        lines.append(f'<row r="{r}">{cells}</row>')
    return f"<worksheet {_MAIN}><sheetData>{''.join(lines)}</sheetData></worksheet>"


def _cell(place: str, value: object) -> str:
    if isinstance(value, str):
        return f'<c r="{place}" t="inlineStr"><is><t>{escape(value)}</t></is></c>'
    return f'<c r="{place}"><v>{value}</v></c>'
