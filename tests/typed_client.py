"""What a type checker sees of the toolkit from outside: `make lint` checks this file, and nothing runs it."""

from pathlib import Path
from typing import assert_type

import numpy as np

import hierarchy_builder
import trainer
from hierarchy_builder import Hierarchy, HierarchyRecipe, build_hierarchy, level_canvases
from trainer import Trajectory, TrajectoryPipeline

shards = hierarchy_builder.build("photos", "out", encoder="dct", recipe=HierarchyRecipe.paper())
assert_type(shards, Path)
assert_type(hierarchy_builder.build_shards("photos", "out"), Path)
assert_type(build_hierarchy(np.zeros((1, 16, 16, 48))), Hierarchy)
level_canvases(np.zeros((1, 16, 16, 48)), np.zeros((1, 3, 16, 16)))

pipe = trainer.train(shards, "run", preset="tiny-cpu")
assert_type(pipe, TrajectoryPipeline)
assert_type(pipe("cat", seed=0), Trajectory)
assert_type(pipe(["cat", "dog"], [0, 1]), list[Trajectory])
assert_type(pipe.to("cpu"), TrajectoryPipeline)
assert_type(pipe.push_to_hub("you/your-network"), str)
assert_type(pipe("cat").resume(1).save("file.safetensors"), None)

wrong: int = hierarchy_builder.build("photos", "out")  # type: ignore[assignment]
trainer.train(shards)  # type: ignore[call-arg]
