"""Features of any origin → nested regions → level canvases, without a command line or a file.

python examples/build_in_python.py
"""

import numpy as np

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.hierarchy.recipe import build_hierarchy, cut_levels

random = np.random.default_rng(0)
features = random.normal(size=(4, 16, 16, 64)).astype(np.float32)
features[:, 4:12, 4:12] += 2 * random.normal(size=64)  # an object in the middle of each image

hierarchy = build_hierarchy(features, HierarchyRecipe.paper())
canvases = level_canvases(features, hierarchy.regions)
print("regions", hierarchy.regions.shape, "canvases", canvases.shape)
print("regions per level:", (hierarchy.regions.reshape(4, 3, -1).max(-1) + 1).tolist())

finer = cut_levels(hierarchy.regions[:, 0], hierarchy.merges, (0.8, 0.6, 0.4, 0.2))  # no features needed
print("cut again into", finer.shape[1] + 1, "levels")
