"""Read off the configuration keys that trainers accept, and what servers take, into trainer_keys.json.

    pip download --no-deps --dest wheels axolotl llamafactory ms-swift vllm
    python tests/golden/make_trainer_keys.py wheels

Nothing is installed or imported: the classes are read from the source in the wheels. Fields that Trainer's arguments
bring along are not listed.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

CLASSES = {
    "axolotl": ("axolotl/utils/schemas/", ["AxolotlInputConfig"]),
    "llamafactory": (
        "llamafactory/hparams/",
        ["ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments"],
    ),
    "ms_swift": ("swift/arguments/", ["SftArguments"]),
}
"""By wheel: where in it the classes are defined, and which make up what a configuration file may say."""


def main() -> None:
    found = {}
    for path in sorted(Path(sys.argv[1]).glob("*.whl")):
        name, version, *_ = path.name.split("-")
        if name in CLASSES:
            folder, classes = CLASSES[name]
            defined = dict(class_definitions(path, folder))
            keys = {key for wanted in classes for key in fields(defined, wanted)}
            found[name] = {"version": version, "classes": classes, "keys": sorted(keys)}
        elif name == "vllm":
            found[name] = {"version": version, "max_lora_rank": literal(path, "vllm/config/lora.py", "MaxLoRARanks")}
    (Path(__file__).parent / "trainer_keys.json").write_text(json.dumps(found, indent=1) + "\n")


def class_definitions(wheel: Path, folder: str) -> Iterator[tuple[str, ast.ClassDef]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(folder) and name.endswith(".py"):
                for node in ast.walk(ast.parse(archive.read(name))):
                    if isinstance(node, ast.ClassDef):
                        yield node.name, node


def fields(defined: dict[str, ast.ClassDef], name: str) -> Iterator[str]:
    """Annotated names of a class and of those of its bases that are defined in the same folder."""
    node = defined.get(name)
    if node is None:
        return
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
    for base in node.bases:
        yield from fields(defined, ast.unparse(base).rpartition(".")[2])


def literal(wheel: Path, file: str, name: str) -> list[int]:
    """The values of `name = Literal[...]`."""
    with zipfile.ZipFile(wheel) as archive:
        for node in ast.parse(archive.read(file)).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                assert isinstance(node.value, ast.Subscript)
                return list(ast.literal_eval(node.value.slice))
    raise SystemExit(f"{file} has no {name}")


if __name__ == "__main__":
    main()
