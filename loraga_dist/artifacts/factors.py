"""`factors/`: the singular triplets of every target, for another rank, split or scale without the gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from loraga_dist.artifacts.names import FACTORS_INDEX, FACTORS_STEM
from loraga_dist.distributed import World
from loraga_dist.errors import RunError
from loraga_dist.linalg import TruncatedSVD
from loraga_dist.safetensors_files import SafetensorsWriter


def write_factors(directory: Path, owned: Mapping[str, TruncatedSVD], world: World) -> None:
    """Each rank writes the targets it owns to one file, rank 0 the index; a collective.

    Keys `<target>.U` (M, K), `<target>.S` (K,), `<target>.Vh` (K, N), float32.
    """
    name = f"{FACTORS_STEM}-{world.rank + 1:05d}-of-{world.size:05d}.safetensors"
    tensors = {
        f"{target}.{part}": tensor
        for target, svd in owned.items()
        for part, tensor in (("U", svd.U_MK), ("S", svd.S_K), ("Vh", svd.Vh_KN))
    }
    with world.together():
        if tensors:
            entries = {key: (torch.float32, tuple(tensor.shape)) for key, tensor in tensors.items()}
            with SafetensorsWriter(directory / name, entries) as writer:
                for key, tensor in tensors.items():
                    writer.append(key, tensor)
    shares = [json.loads(text) for text in world.all_texts(json.dumps(dict.fromkeys(tensors, name)))]
    with world.together():
        if world.is_main:
            weight_map = {key: file for share in shares for key, file in share.items()}
            num_bytes = sum((directory / file).stat().st_size for file in set(weight_map.values()))
            try:
                (directory / FACTORS_INDEX).write_text(
                    json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": weight_map}, indent=2) + "\n"
                )
            except OSError as error:
                raise RunError(f"{directory / FACTORS_INDEX} cannot be written ({error.strerror})") from error
