"""Edit a trajectory, draw its finer levels again, and measure how far the edit reached.

python examples/editing.py runs/demo/run
"""

import sys

from trainer import TrajectoryPipeline
from trainer.metrics.edit_locality import latent_invariance
from trainer.trajectories.compare import compare, comparison_png
from trainer.trajectories.selection import Selection

run = sys.argv[1] if len(sys.argv) > 1 else "runs/demo/run"
pipe = TrajectoryPipeline.from_pretrained(run)
before, other = pipe(label=5, seed=0), pipe(label=2, seed=0)

# A feature edit: the object takes the mean feature of another image's object, a little of the corner left out.
target = before.region(1, level=0) - Selection.from_coordinates([(0, 3)], grid=before.grid, level=0)
edited = before.edit_features(target, other.mean_of(other.region(1, level=0)), strength=0.8)
after = edited.resume(from_level=0)

# Levels 1 to 3 were drawn again from their own noise, so measure against the same without the edit.
baseline = before.resume(from_level=0)
for level, lis in latent_invariance(baseline.levels, after.levels, target.mask, 0).items():
    print(f"LIS 0 → {level}: {lis:.2e}")
for row in compare(baseline, after):
    print({name: value for name, value in row.items() if name in ("level", "change", "changed_share")})
comparison_png(baseline, after).save("edited.png")

# A shape edit and other noise on top; then all the way back.
wider = after.shrink_region(1, level=1).resume(from_level=1, seeds=7)
print("steps:", [step["edit"] for step in wider.history])
while wider.replaced:
    wider = wider.undo()
print("back at the start:", wider.levels.equal(before.levels))
