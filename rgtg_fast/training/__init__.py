"""Reward models for partial sequences, trained at the cost of a full-sequence reward model."""

from .collate import LabelledCollator, PairCollator
from .config import PrefixRewardConfig
from .data import DataReport, LabelledDataset, PreferenceDataset
from .trainer import PrefixRewardTrainer

__all__ = [
    "DataReport",
    "LabelledCollator",
    "LabelledDataset",
    "PairCollator",
    "PreferenceDataset",
    "PrefixRewardConfig",
    "PrefixRewardTrainer",
]
