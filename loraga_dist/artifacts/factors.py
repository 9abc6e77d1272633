"""`factors/`: the singular triplets of every target, for another rank, split or scale without the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraga_dist.artifacts.names import FACTORS_STEM
from loraga_dist.files.checksums import TensorDigest, shared_fingerprint
from loraga_dist.files.parallel import over_cores
from loraga_dist.files.safetensors_io import Entries, TensorSlot
from loraga_dist.files.shared_tensors import write_shared_tensors
from loraga_dist.linalg import TruncatedSVD
from loraga_dist.ranks.world import World


def triplet_tensors(name: str, svd: TruncatedSVD) -> dict[str, Tensor]:
    """The tensors of one target's triplets, by key."""
    return {f"{name}.U": svd.U_MK, f"{name}.S": svd.S_K, f"{name}.Vh": svd.Vh_KN}


def triplet_entries(name: str, M: int, K: int, N: int) -> Entries:
    """Their dtypes and shapes."""
    shapes = {"U": (M, K), "S": (K,), "Vh": (K, N)}
    return {f"{name}.{part}": (torch.float32, shape) for part, shape in shapes.items()}


def read_triplets(name: str, slots: Mapping[str, TensorSlot]) -> TruncatedSVD:
    """The triplets of one target as stored; raises RunError on a short read."""
    U_MK, S_K, Vh_KN = (slots[f"{name}.{part}"].read() for part in ("U", "S", "Vh"))
    return TruncatedSVD(U_MK=U_MK, S_K=S_K, Vh_KN=Vh_KN)


def write_factors(directory: Path, owned: Mapping[str, TruncatedSVD], world: World) -> str:
    """Each rank writes the targets it owns to one file, rank 0 the index; returns their fingerprint; a collective.

    Keys `<target>.U` (M, K), `<target>.S` (K,), `<target>.Vh` (K, N), float32. Of schemes that whiten, rows of Vh are
    for inputs as they are: U S Vh is the regression of dy on x, and Vh is not orthonormal.
    """
    tensors = {key: tensor for name, svd in owned.items() for key, tensor in triplet_tensors(name, svd).items()}
    write_shared_tensors(directory, FACTORS_STEM, tensors, world)
    digests: dict[str, TensorDigest] = {}
    with world.together():
        digests = dict(zip(tensors, over_cores(TensorDigest.of, tensors.values()), strict=True))
    return shared_fingerprint(digests, world)
