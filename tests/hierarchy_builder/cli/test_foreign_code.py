"""A build of a stranger names its encoder; what it names runs only if the user says so."""

from pathlib import Path

import pytest
from command_line import cli
from pictures import write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig
from hierarchy_builder.encoders import check_stored_encoder
from hierarchy_builder.errors import UsageError
from hierarchy_builder.progress import Reporter
from hierarchy_builder.quality.assessment import _open_photos
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.verify.repair import repair

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
OWN = "patch_means:PatchMeans"


@pytest.mark.parametrize("name", ["os:abort", "antigravity:x", "dct:x", "timmy:x", ":x"])
def test_function_in_a_build_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--trust-encoder"):
        check_stored_encoder(name, "DIR", trusted=False)
    check_stored_encoder(name, "DIR", trusted=True)


@pytest.mark.parametrize("name", ["dct", "dinov2-reg-base", "timm:vit_tiny", "onnx:model.onnx:out"])
def test_known_encoder_in_a_build_is_not_asked_about(name: str) -> None:
    check_stored_encoder(name, "DIR", trusted=False)


def test_commands_that_continue_a_build_ask_before_its_function_runs(tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path / "build")
    photos = write_tree(tmp_path / "photos", per_class=1)
    steps.extract(folder, str(photos), ExtractConfig(encoder=OWN), SESSION)
    assert "--trust-encoder" in _open_photos(folder, False).why_not
    assert _open_photos(folder, True).encoder is not None
    for marker in folder.markers("extract"):
        marker.unlink()
    again = ("extract", folder.root, "--workers", "0", "--quiet")
    refused = cli("hierarchy-builder", *again)
    assert refused.code == 2
    assert f"is the function '{OWN}'" in refused.err
    with pytest.raises(UsageError, match="--trust-encoder"):
        repair(folder, SESSION)
    assert cli("hierarchy-builder", *again, "--encoder", OWN).code == 0
    assert cli("hierarchy-builder", *again, "--trust-encoder").code == 0
