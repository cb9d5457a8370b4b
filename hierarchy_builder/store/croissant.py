"""Croissant metadata of a shard set: what catalogues of data sets read, https://docs.mlcommons.org/croissant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hierarchy_builder.records import IMAGE_MEMBER, LABEL_MEMBER, METADATA_MEMBER
from hierarchy_builder.terminal import counted

CROISSANT = "croissant.json"

PREFIXED = """
extract field fileProperty fileObject fileSet format includes isLiveDataset jsonPath key md5 parentField path
recordSet references regex repeated replace samplingRate separator source subField transform
"""
"""Names that the context takes from the vocabulary of Croissant itself."""
CONTEXT = {
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
    "sc": "https://schema.org/",
    **{name: f"cr:{name}" for name in PREFIXED.split()},
}
"""The JSON-LD context that the Croissant specification 1.0 prescribes."""

MIME_TYPES = {LABEL_MEMBER: "text/plain", METADATA_MEMBER: "application/json", IMAGE_MEMBER: "image/jpeg"}
"""Types of the members of a sample; the others are numpy's .npy files."""


def croissant_of(index: Mapping[str, Any], class_map: Mapping[str, int]) -> dict[str, Any]:
    """Return Croissant metadata (version 1.0): the tars, the members of samples in them, and tables of these.

    Labels, metadata and pictures are record sets, whose `key` joins them. Features and regions are files only, since
    Croissant has no type for arrays in .npy files.
    """
    tars = [
        {
            "@type": "cr:FileObject",
            "@id": entry["url"],
            "name": entry["url"],
            "contentUrl": entry["url"],
            "contentSize": f"{entry['filesize']} B",
            "encodingFormat": "application/x-tar",
            "sha256": entry["sha256"],
        }
        for entry in index["shardlist"]
    ]
    members = [
        {
            "@type": "cr:FileSet",
            "@id": f"member-{name}",
            "name": f"member-{name}",
            "containedIn": [{"@id": tar["@id"]} for tar in tars],
            "encodingFormat": MIME_TYPES.get(name, "application/octet-stream"),
            "includes": f"*.{name}",
        }
        for name in index["members"]
    ]
    tables = [_table("labels", LABEL_MEMBER, "label", "Class id, see class_map.json.", "sc:Text")]
    tables.append(
        _table("metadata", METADATA_MEMBER, "metadata", "Path of the image, class name, size.", "sc:Text")
    )
    if IMAGE_MEMBER in index["members"]:
        tables.append(_table("pictures", IMAGE_MEMBER, "picture", "The encoded crop.", "sc:ImageObject"))
    height, width = index["grid"]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": index["name"],
        "description": f"{counted(index['num_samples'], 'image')} of {counted(len(class_map), 'class', 'classes')}: "
        f"features of {index['encoder']['name']} on a {height}×{width} grid, and nested regions of "
        f"{counted(index['num_levels'] - 1, 'level')}.",
        "license": index.get("licence", "unknown"),
        "version": f"{index['format_version']}.0.0",
        "distribution": [*tars, *members],
        "recordSet": tables,
    }


def _table(name: str, member: str, column: str, text: str, kind: str) -> dict[str, Any]:
    """Return a record set with the content of one member of every sample, and the key of the sample."""
    files, ending = {"fileSet": {"@id": f"member-{member}"}}, member.replace(".", r"\.")
    key = files | {"extract": {"fileProperty": "fullpath"}, "transform": {"regex": rf"^(.+)\.{ending}$"}}
    columns = {
        "key": ("Name of the sample.", "sc:Text", key),
        column: (text, kind, files | {"extract": {"fileProperty": "content"}}),
    }
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"{name}/{field}",
            "name": field,
            "description": about,
            "dataType": type_name,
            "source": source,
        }
        for field, (about, type_name, source) in columns.items()
    ]
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "field": fields}
