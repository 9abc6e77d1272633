"""Tensors that several ranks hold, as one set of safetensors files with an index, laid out like model checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from loraga_dist.errors import RunError
from loraga_dist.files.safetensors_io import SafetensorsWriter
from loraga_dist.ranks.world import World


def write_shared_tensors(directory: Path, stem: str, tensors: Mapping[str, Tensor], world: World) -> None:
    """Each rank writes its own tensors (contiguous, on the host) to one file, rank 0 the index; a collective.

    `safetensors_files.scan_checkpoint(directory, stem)` finds them. Raises RunError when a file cannot be written.
    """
    name = f"{stem}-{world.rank + 1:05d}-of-{world.size:05d}.safetensors"
    widest_first = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    with world.together():
        if widest_first:
            entries = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in widest_first.items()}
            with SafetensorsWriter(directory / name, entries) as writer:
                for key, tensor in widest_first.items():
                    writer.append(key, tensor)
    shares = world.all_json(dict.fromkeys(tensors, name))
    with world.together():
        if world.is_main:
            weight_map = {key: file for share in shares for key, file in share.items()}
            index = directory / f"{stem}.safetensors.index.json"
            try:
                num_bytes = sum((directory / file).stat().st_size for file in set(weight_map.values()))
                index.write_text(
                    json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": weight_map}, indent=2) + "\n"
                )
            except OSError as error:
                raise RunError(f"{index} cannot be written ({error.strerror})") from error
