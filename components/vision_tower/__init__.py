"""Vision tower: pictures in, patch features out. The image encoders of open_clip."""

from components.vision_tower.base import VisionTower
from components.vision_tower.open_clip_tower import OpenClipTower

__all__ = ["OpenClipTower", "VisionTower"]
