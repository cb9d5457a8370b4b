"""The names that the documentation promises can be imported and take the promised arguments."""

from __future__ import annotations

import importlib
import inspect

import pytest

PROMISED = {
    "hierarchy_builder.hierarchy:build_hierarchy": "features recipe",
    "hierarchy_builder.config:HierarchyRecipe.paper": "",
    "hierarchy_builder.config:HierarchyRecipe.stable": "",
    "hierarchy_builder.canvases:level_canvases": "features regions",
    "hierarchy_builder.encoders:load_encoder": "name",
    "trainer.official:load_checkpoint": "path config ema",
    "trainer.official:load_latent_forcing": "folder",
    "trainer.methods.trajectory_forcing:loss": "model x *prev *level *label *regions *t *r *noise *guidance "
    "*region_weight",
    "trainer.sample:sample_levels": "model label noise num_steps",
    "trainer.decode:load_rae_decoder": "weights config",
    "trainer.schedules:ema_beta": "step halflife_kimg",
    "trainer.schedules:plateau_logit_normal": "n mean std shift generator",
    "trainer.metrics.edit_locality:latent_invariance": "before after edited_mask edit_level",
    "trainer.metrics.region_consistency:parent_misrouting": "child_regions parent_regions child_features",
    "trainer:TrajectoryPipeline.from_pretrained": "folder ema decoder device weak",
    "trainer:TrajectoryPipeline.__call__": "self label seed num_steps guidance weak_scale temperature",
    "trainer:TrajectoryPipeline.adopt": "self trajectory",
    "trainer:Trajectory.decode": "self level",
    "trainer:Trajectory.edit_features": "self selection source strength *level",
    "trainer:Trajectory.edit_shape": "self selection region *level",
    "trainer:Trajectory.resume": "self from_level seeds",
}
"""Path → arguments, in order; with a star those that are named in a call."""


@pytest.mark.parametrize("path", PROMISED)
def test_a_promised_name_takes_the_promised_arguments(path: str) -> None:
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters
    positional = [each for each in PROMISED[path].split() if not each.startswith("*")]
    named = [each[1:] for each in PROMISED[path].split() if each.startswith("*")]
    assert list(parameters)[: len(positional)] == positional
    assert set(named) <= set(parameters)
    assert all(parameters[each].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for each in positional)
