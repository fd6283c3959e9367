"""Contrastive learning with hard negatives: the objective, and SimCLR's views made in batches."""

from hardneg.augment import apply, draw, normalize
from hardneg.losses import contrastive_loss

__version__ = '1.0.0'
__all__ = ['apply', 'contrastive_loss', 'draw', 'normalize']
