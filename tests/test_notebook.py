"""The notebook of examples runs from top to bottom and really makes the pictures it speaks of."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"
CHECKS = """
assert "<" in trajectory._repr_html_()
assert before.dtype == "uint8" and before.std() > 1, "the sample is one flat colour"
assert (before != after).any(), "the edit changed no pixel"
from trainer import TrajectoryPipeline
again = TrajectoryPipeline.from_pretrained(saved)(label="astronaut", seed=0)
assert again.levels.equal(trajectory.levels), "the saved model draws another sample"
"""


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_words_stand_before_each_code_cell_and_no_output_is_stored() -> None:
    kinds = [cell["cell_type"] for cell in cells()]
    assert "code" in kinds
    for number, cell in enumerate(cells()):
        if cell["cell_type"] == "code":
            assert kinds[number - 1] == "markdown"
            assert "You see" in "".join(cells()[number - 1]["source"]).replace("\n", " ")
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.drill  # it builds and trains
def test_the_notebook_makes_an_edited_picture(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    source = "\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    done = subprocess.run(
        [sys.executable, "-c", source + CHECKS], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    picture = np.asarray(Image.open(tmp_path / "tour" / "edited.png"))
    left, right = np.split(picture, 2, axis=1)
    assert (left != right).any()
