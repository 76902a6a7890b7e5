"""What ``grpocem-export`` does: an export, shown, and uploaded where that is asked for."""

from pathlib import Path

import ml_collections

from grpocem_jax.export import screens
from grpocem_jax.export.model import Exported, check_new, check_options, export_model
from grpocem_jax.utils import files
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.terminal import show


def run(
    *,
    workdir: str | None,
    out: str | None,
    settings: ml_collections.ConfigDict | None = None,
    adapter: str | None = None,
    model: str | None = None,
    format: str = "merged",
    dtype: str | None = None,
    rank: int | None = None,
    repository: str | None = None,
    private: bool = False,
) -> Exported:
    """Runs the command; arguments are its flags.

    Raises:
      InputError: flags that are missing or contradict each other, and whatever `export_model`
        raises; no token for the Hub, a name that it refuses or has already, or no network to it.
    """
    if not workdir:
        raise InputError("--workdir is missing; give a run directory with a trained adapter.")
    if not out:
        raise InputError("--out is missing; give a folder to make.")
    if private and repository is None:
        raise InputError("--private is for the Hub; give --push_to_hub=USER/NAME too.")
    check_new(files.expand(out, "--out"))
    check_options(format, dtype, rank)
    if repository is not None:
        _check_push(repository)
    exported = export_model(
        workdir,
        out,
        adapter=adapter,
        settings=settings,
        model=model,
        format=format,
        dtype=dtype,
        rank=rank,
    )
    show(screens.exported(exported))
    if repository is not None:
        show(f"pushed    {_push(exported.folder, repository, private)}")
    return exported


def _check_push(repository: str) -> None:
    """Refuses, before any work, a name that the Hub would refuse, and a push without a token."""
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise InputError(
            f"--push_to_hub={repository}: is no name of a model on the Hub; give USER/NAME."
        ) from None
    if huggingface_hub.get_token() is None:
        raise InputError(
            f"--push_to_hub={repository}: there is no token for the Hub; run `hf auth login`, or "
            "set HF_TOKEN."
        )


def _push(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder as a new model on the Hub, and returns its address."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repository, private=private or None)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--push_to_hub={repository}: the Hub did not take it ({reason}); {folder} is whole: "
            f"mend this and run `hf upload {repository} {folder}`."
        ) from None
    return str(made)
