"""A finished output on the Hugging Face hub: asked for before the run, done after it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import FACTORS, LORAGA_INIT, LORAGA_OFFSET, README, REPORT, RESIDUAL_BASE
from loraga_dist.artifacts.report import Report
from loraga_dist.config import OutputConfig
from loraga_dist.errors import RunError, UserError, printable
from loraga_dist.publish.card import model_card
from loraga_dist.ranks.rendezvous import begun
from loraga_dist.ranks.world import World

_KEY = "output.push_to_hub"


def check_hub_access(config: OutputConfig) -> None:
    """Raise UserError unless the hub's token may write where `push_to_hub` says; one request, nothing is created."""
    repo = config.push_to_hub
    if repo is None:
        return
    try:
        validate_repo_id(repo)
        user = HfApi().whoami()
    except HFValidationError as error:
        raise UserError(_KEY, repo, f"is no repository id ({error}); write user/name") from error
    except Exception as error:  # no token, a wrong one, offline; the HTTP library's own errors have no common base
        raise UserError(_KEY, repo, f"the hub gives no access ({_first_line(error)}); run `hf auth login`") from error
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UserError(_KEY, repo, f"{user['name']}'s token may only read; log in with one that may write")
    namespaces = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if "/" in repo and repo.split("/")[0] not in namespaces:
        problem = f"belongs to another account; write {' or '.join(f'{name}/...' for name in namespaces)}"
        raise UserError(_KEY, repo, problem)


def push_output(directory: Path, report: Report, world: World) -> None:
    """Upload card, adapter, offset and report, and the residual base if asked for; rank 0 says where they are.

    A collective: rank 0 uploads while the others wait, without a time limit. Raises RunError when that fails, with
    `directory` as complete as before, KeyboardInterrupt without waiting for the upload. Does nothing where the
    configuration asks for nothing.
    """
    repo = report.config.output.push_to_hub
    if repo is None:
        return
    try:
        upload = begun(lambda: _upload(directory, report)) if world.is_main else None
        while not _is_done(upload, world):
            time.sleep(0.2)
    except KeyboardInterrupt as error:
        done = f"the output in {directory} is complete and verified, and `hf upload` takes it as it is"
        raise KeyboardInterrupt(f"interrupted while {repo} was uploaded; {done}") from error
    with world.together():
        if upload is not None:
            print(printable(f"pushed to {upload.result()}"), flush=True)


def _is_done(upload: Future[str] | None, world: World) -> bool:
    done = float(upload is not None and upload.done())
    return bool(world.max_(torch.tensor([done], device=world.device)).item())


def _upload(directory: Path, report: Report) -> str:
    api, repo_id = HfApi(library_name="loraga_dist"), report.config.output.push_to_hub
    assert repo_id is not None, "asked for"
    left_out = {FACTORS} if report.config.output.push_residual_base else {FACTORS, RESIDUAL_BASE}
    folders = [name for name in Layout.of_report(report).directories if name not in left_out]
    try:
        url = api.create_repo(repo_id, exist_ok=True)
        found = [directory / REPORT, *(path for name in folders for path in (directory / name).rglob("*"))]
        paths = {
            path.relative_to(directory).as_posix(): path for path in found if path.is_file() and not path.is_symlink()
        }
        # of an earlier start: its files beside this one's would load together
        ours = tuple(f"{folder}/" for folder in (LORAGA_INIT, LORAGA_OFFSET, RESIDUAL_BASE))
        stale = [name for name in api.list_repo_files(url.repo_id) if name.startswith(ours) and name not in paths]
        # one commit: an adapter beside another start's card would be loaded on the wrong base
        api.create_commit(
            url.repo_id,
            [
                CommitOperationAdd(README, model_card(report, url.repo_id).encode()),
                *(CommitOperationAdd(name, path) for name, path in sorted(paths.items())),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"{report.scheme.title} start",
        )
    except Exception as error:  # as above: whatever it was, the output is not touched
        raise RunError(
            f"push: {repo_id} was not uploaded ({_first_line(error)}); the output in {directory} is "
            "complete and verified, and `hf upload` takes it as it is"
        ) from error
    return str(url)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
