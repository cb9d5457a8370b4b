"""One label, one seed, every level: from a trained run to pictures.

python examples/sample_in_python.py runs/demo/run
"""

import sys

from PIL import Image

from trainer import TrajectoryPipeline

run = sys.argv[1] if len(sys.argv) > 1 else "runs/demo/run"
trajectory = TrajectoryPipeline.from_pretrained(run)(label=0, seed=7)
print("levels", tuple(trajectory.levels.shape))
trajectory.save("trajectory.safetensors")
for level, picture in enumerate(trajectory.decode()):
    Image.fromarray(picture).save(f"level-{level}.png")
