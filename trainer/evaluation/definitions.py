"""The figures of a run in words: figures.yaml holds their names, which direction is better, and what they mean.

Pages use them; terminals and files keep the short names, which docs/metrics.md defines in full.
"""

from __future__ import annotations

from hierarchy_builder.canvases.glossary import Glossary

FIGURES = Glossary.read("trainer.evaluation", "figures.yaml")
TITLE = "What the figures mean"
TEXT = "↑ higher is better, ↓ lower is better; the other figures describe."
