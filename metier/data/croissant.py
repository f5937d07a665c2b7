"""The data set's manifest -> croissant.json: Croissant 1.0 metadata (JSON-LD) with the RAI vocabulary, and all counts.

https://docs.mlcommons.org/croissant/docs/croissant-spec.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metier import artifacts

FIELDS = {
    "record_id": "sc:Text",
    "split": "sc:Text",
    "group_id": "sc:Text",
    "label": "sc:Text",
    "language": "sc:Text",
    "source_file": "sc:Text",
    "source_row": "sc:Integer",
    "parent_id": "sc:Text",
    "method": "sc:Text",
    "weight": "sc:Float",
}
FILES = ("records.parquet", "rejected.parquet", "merged.parquet", "conflicts.parquet")
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(details: dict[str, Any], work: Path) -> dict[str, Any]:
    """The JSON-LD document; `work` holds the finished files, whose digests go in."""
    counts, splits = details["counts"], details["splits"]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "dataset",
        "description": f"{counts['rows']} source rows: {counts['kept']} kept, {counts['merged']} merged, "
        f"{counts['rejected']} rejected; {counts['synthetic']} synthetic records. "
        + ", ".join(f"{name} {count}" for name, count in splits.items()),
        "license": "unknown",
        "inLanguage": [code for code in ("en", "zh") if details["languages"][code]],
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": name,
                "name": name,
                "contentUrl": name,
                "encodingFormat": "application/x-parquet",
                "sha256": artifacts.digest_file(work / name),
            }
            for name in FILES
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "records",
                "name": "records",
                "field": [*(_field(f"records/{name}", kind, name) for name, kind in FIELDS.items()), _messages()],
            }
        ],
        "rai:dataPreprocessingProtocol": [
            *(f"rejected, {reason}: {count}" for reason, count in details["rejected_by_reason"].items()),
            *(f"merged, {how}: {count}" for how, count in details["merged_by_kind"].items()),
        ],
        "rai:dataManipulationProtocol": "Splits by groups joined with near-duplicates; shared with training: "
        + ", ".join(f"{kind} {count}" for kind, count in details["leakage"]["shared_with_train"].items()),
        "rai:hasSyntheticData": bool(counts["synthetic"]),
    }


def _field(path: str, kind: str, column: str) -> dict[str, Any]:
    source = {"fileObject": {"@id": "records.parquet"}, "extract": {"column": column}}
    return {"@type": "cr:Field", "@id": path, "name": path.rpartition("/")[2], "dataType": kind, "source": source}


def _messages() -> dict[str, Any]:
    """The turns of a record: a list of {role, content}."""
    turns = []
    for name in ("role", "content"):
        turn = _field(f"records/messages/{name}", "sc:Text", "messages")
        turns.append({**turn, "source": {**turn["source"], "transform": {"jsonPath": f"$[*].{name}"}}})
    return {"@type": "cr:Field", "@id": "records/messages", "name": "messages", "repeated": True, "subField": turns}
