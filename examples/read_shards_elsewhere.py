"""Our shards in somebody else's trainer: plain webdataset, canvases built where they are needed.

python examples/read_shards_elsewhere.py runs/demo/build/train/shards
"""

import sys
from pathlib import Path

import torch
import webdataset

from hierarchy_builder.canvases import level_canvases

shards = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/build/train/shards")
urls = sorted(str(path) for path in shards.glob("*.tar"))
stream = (
    webdataset.WebDataset(urls, shardshuffle=False)
    .decode()
    .to_tuple("features.npy", "regions.npy", "cls")
    .batched(32)
)
for features, regions, label in stream:
    canvases = level_canvases(torch.as_tensor(features).float(), torch.as_tensor(regions))
    print(f"canvases {tuple(canvases.shape)}, labels {sorted(set(label))[:8]}")
    break
