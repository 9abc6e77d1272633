"""`factors/`: the singular triplets of every target, for another rank, split or scale without the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraga_dist.artifacts.names import FACTORS_STEM
from loraga_dist.files.checksums import TensorDigest, shared_fingerprint
from loraga_dist.files.parallel import over_cores
from loraga_dist.files.shared_tensors import write_shared_tensors
from loraga_dist.linalg import TruncatedSVD
from loraga_dist.ranks.world import World


def write_factors(directory: Path, owned: Mapping[str, TruncatedSVD], world: World) -> str:
    """Each rank writes the targets it owns to one file, rank 0 the index; returns their fingerprint; a collective.

    Keys `<target>.U` (M, K), `<target>.S` (K,), `<target>.Vh` (K, N), float32. Of schemes that whiten, rows of Vh are
    for inputs as they are: U S Vh is the regression of dy on x, and Vh is not orthonormal.
    """
    tensors = {
        f"{target}.{part}": tensor
        for target, svd in owned.items()
        for part, tensor in (("U", svd.U_MK), ("S", svd.S_K), ("Vh", svd.Vh_KN))
    }
    write_shared_tensors(directory, FACTORS_STEM, tensors, world)
    digests: dict[str, TensorDigest] = {}
    with world.together():
        digests = dict(zip(tensors, over_cores(TensorDigest.of, tensors.values()), strict=True))
    return shared_fingerprint(digests, world)
