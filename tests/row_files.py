"""Writes rows as a file of any kind, and finds those that share text with tasks."""

import csv
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.core.decontamination import Overlap, TaskIndex
from sdft_ray.data import records

ONE_FILE = [
    *(f"rows{suffix}{packing}" for suffix in (".json", ".jsonl", ".csv") for packing in ("", ".gz", ".zst")),
    *("rows.parquet", "stream.arrow", "file.arrow", "ROWS.CSV"),
]


def save(rows: list[dict], path: Path) -> Path:
    """Write rows as the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    match records.kind(path):
        case ".jsonl":
            pack(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        case ".json":
            pack(path, json.dumps(rows).encode())
        case ".csv":
            with path.open("w", newline="") as file:
                lines = csv.DictWriter(file, rows[0])
                lines.writeheader()
                lines.writerows(rows)
            pack(path, path.read_bytes())
        case ".parquet":
            pq.write_table(table, path)
        case ".arrow":
            new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
            with new(path, table.schema) as file:
                file.write_table(table, max_chunksize=2)
    return path


def pack(path: Path, content: bytes) -> None:
    if path.suffix == ".zst":
        with pa.output_stream(path, compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def find_overlaps(rows: Mapping[str, Iterable[str]], tasks: Mapping[str, Iterable[str]], n: int) -> list[Overlap]:
    """Return the overlaps of several rows, by their ids, with tasks."""
    index = TaskIndex(tasks, n)
    return [overlap for row, texts in rows.items() for overlap in index.find(row, texts)]
