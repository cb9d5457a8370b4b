"""The script that measures a GPU, rehearsed on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_rehearsal_writes_figures_and_a_failing_section_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "roof.done").touch()  # as an earlier call leaves it
    sections = "parity,roof,counts,step,loader,update,hierarchy,sample,post_training"
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--sections", sections],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    ended = {path.stem for path in tmp_path.glob("*.done")}
    assert ended == set(sections.split(",")) - {"loader"}, done.stdout + done.stderr
    assert done.returncode == 1
    assert "loader: failed with code 1" in done.stdout  # there are no shards without section build
    rows = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    values = {row["name"]: row["value"] for row in rows}
    # Sizes of a rehearsal, parts of another figure, and machines with other numbers of cores are in no prediction.
    without = [row["name"] for row in rows if not row["is_predicted"] and "at width 8" not in row["name"]]
    assert [name for name in without if not re.match(r"hierarchy: \d+ cores", name)] == []
    assert not any(name.startswith("roof") for name in values)
    assert [name for name, value in values.items() if "failed" in str(value)] == []
    assert values["parity: parameters without a gradient"] == 0
    assert values["parity: gradients, largest relative difference, float32"] == 0
    assert values["counts: backward pass"] > values["counts: forward pass alone"] > 0
