"""Two clients of object stores, s3fs and obstore, at the same S3 server on loopback.

    pip install obstore
    python -m benchmarks.builder.object_clients [--repeats 5] [--record]

The server is moto in a process of its own. It is one Python process, so it may be what limits a rate; the seconds of
CPU are those of the client alone. Each figure is the median of the repeats, in which the clients take turns.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import records

MB = 10**6
RANGE_BYTES, OBJECT_BYTES = 8 * MB, 128 * MB
SMALL, SMALL_BYTES, AT_ONCE = 200, 2_000, 8
BUCKET = "clients"


def of_s3fs(endpoint: str) -> dict[str, Callable[..., Any]]:
    """The calls of `hierarchy_builder/files/remote.py`."""
    import s3fs

    fs = s3fs.S3FileSystem(
        key="test", secret="test", endpoint_url=endpoint, use_listings_cache=False, skip_instance_cache=True
    )

    def upload(name: str, data: bytes) -> None:
        with fs.open(f"{BUCKET}/{name}", "wb", block_size=16 * 2**20, autocommit=False) as file:
            file.write(data)
        file.commit()

    return {
        "range": lambda name, start, end: fs.cat_file(f"{BUCKET}/{name}", start=start, end=end),
        "get": lambda name: fs.cat_file(f"{BUCKET}/{name}", max_concurrency=1),
        "put": lambda name, data: fs.pipe_file(f"{BUCKET}/{name}", data),
        "upload": upload,
        "list": lambda prefix: len(fs.find(f"{BUCKET}/{prefix}")),
    }


def of_obstore(endpoint: str) -> dict[str, Callable[..., Any]]:
    """The same calls of obstore."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        endpoint=endpoint,
        access_key_id="test",
        secret_access_key="test",
        region="us-east-1",
        client_options={"allow_http": True},
    )
    return {
        "range": lambda name, start, end: obstore.get_range(store, name, start=start, end=end).to_bytes(),
        "get": lambda name: obstore.get(store, name).bytes().to_bytes(),
        "put": lambda name, data: obstore.put(store, name, data, use_multipart=False),
        "upload": lambda name, data: obstore.put(store, name, data, chunk_size=16 * 2**20),
        "list": lambda prefix: sum(map(len, obstore.list(store, prefix))),
    }


def in_threads(call: Callable[[Any], Any], units: list[Any]) -> None:
    """Make calls from some threads at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(call, units))


def tasks(
    client: dict[str, Callable[..., Any]], name: str
) -> dict[str, tuple[Callable[[], Any], float, str]]:
    """By name: what is timed, how much of it there is, and the unit of the rate."""
    data, small = bytes(OBJECT_BYTES), bytes(SMALL_BYTES)
    ranges = [(start, start + RANGE_BYTES) for start in range(0, OBJECT_BYTES, RANGE_BYTES)]
    names = [f"{name}-small/{number:04d}" for number in range(SMALL)]

    def read(part: tuple[int, int]) -> None:
        assert len(client["range"](f"{name}-large", *part)) == RANGE_BYTES

    size = OBJECT_BYTES / MB
    return {
        "write 128 MB in parts": (lambda: client["upload"](f"{name}-large", data), size, "MB/s"),
        "read it in ranges of 8 MB, one after the other": (lambda: list(map(read, ranges)), size, "MB/s"),
        f"the ranges, {AT_ONCE} at once": (lambda: in_threads(read, ranges), size, "MB/s"),
        f"write {SMALL} objects of 2 kB": (
            lambda: [client["put"](each, small) for each in names],
            SMALL,
            "objects/s",
        ),
        f"read {SMALL} objects of 2 kB": (lambda: list(map(client["get"], names)), SMALL, "objects/s"),
        f"read them, {AT_ONCE} at once": (lambda: in_threads(client["get"], names), SMALL, "objects/s"),
        f"list {SMALL} objects": (lambda: client["list"](f"{name}-small/"), SMALL, "objects/s"),
    }


def make_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    records.add_option(parser)
    return parser


def main() -> None:
    """Measure both clients and print a table."""
    asked = make_parser().parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        measure(f"http://127.0.0.1:{port}", asked.repeats, asked.record)
    finally:
        server.kill()


def measure(endpoint: str, repeats: int, record: str | None) -> None:
    """Let the clients take turns, and print the medians."""
    import obstore
    import s3fs

    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    s3fs.S3FileSystem(key="test", secret="test", endpoint_url=endpoint).mkdir(BUCKET)
    clients = {"s3fs": tasks(of_s3fs(endpoint), "s3fs"), "obstore": tasks(of_obstore(endpoint), "obstore")}
    found = dict[tuple[str, str], list[tuple[float, float]]]()
    for turn in range(repeats + 1):  # the first warms up
        for task in clients["s3fs"]:
            for name in sorted(clients, reverse=bool(turn % 2)):
                began, used = time.perf_counter(), time.process_time()
                clients[name][task][0]()
                if turn:
                    spent = time.perf_counter() - began, time.process_time() - used
                    found.setdefault((name, task), []).append(spent)
    rows = []
    for task, (_, amount, unit) in clients["s3fs"].items():
        row = [task]
        for name in clients:
            wall, cpu = (statistics.median(each) for each in zip(*found[name, task], strict=True))
            row += [f"{amount / wall:,.0f} {unit}", f"{1000 * cpu:,.0f} ms"]
        rows.append(row)
        print("  ".join(row), flush=True)
    versions = f"s3fs {s3fs.__version__}", f"obstore {obstore.__version__}"
    columns = ["", *(text for version in versions for text in (version, "CPU of the client"))]
    records.write(record, columns=columns, rows=rows, figures={"repeats": repeats})


if __name__ == "__main__":
    main()
