"""Backends that hold the model: whole in one process, or sharded over ranks."""

from loraga_dist.sharding.base import Sharding
from loraga_dist.sharding.single import SingleProcess
from loraga_dist.sharding.zero3 import Zero3

__all__ = ["Sharding", "SingleProcess", "Zero3"]
