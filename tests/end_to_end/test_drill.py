"""A few injected faults; `make drill` runs the tests marked `drill` as well, and then many faults of each kind."""

import signal

import pytest
from drill import Drill


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    return Drill(tmp_path_factory.mktemp("drill"), seed=1, per_class=8)


@pytest.mark.timeout(200)
def test_killed_drivers_resume_to_the_same_bytes(drill: Drill) -> None:
    drill.kill_drivers(3)
    assert drill.faults["driver killed"] >= 3


@pytest.mark.drill
@pytest.mark.timeout(200)
def test_a_stopped_run_ends_with_75_and_resumes(drill: Drill) -> None:
    drill.kill_drivers(2, signal.SIGTERM)
    assert drill.faults["driver stopped"] >= 2


@pytest.mark.drill
@pytest.mark.timeout(200)
def test_torn_files_are_repaired(drill: Drill) -> None:
    drill.tear(2)
    assert drill.faults["file torn"] == 2


@pytest.mark.drill
@pytest.mark.timeout(200)
def test_a_full_disk_is_an_error_that_leaves_nothing_half(drill: Drill) -> None:
    drill.fill_disk(1)
    assert "File too large" in drill.log.read_text()
    assert "make room, then give the same command again" in drill.log.read_text()


@pytest.mark.timeout(200)
def test_a_stopped_run_on_ray_ends_with_75_and_resumes(drill: Drill) -> None:
    drill.stop_with_workers()


@pytest.mark.drill
@pytest.mark.timeout(280)
def test_killed_workers_are_replaced(drill: Drill) -> None:
    drill.kill_workers(1)


@pytest.mark.drill
@pytest.mark.timeout(280)
def test_a_lost_node_costs_nothing_but_time(drill: Drill) -> None:
    drill.lose_node()
