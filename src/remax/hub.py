"""The way of a trained model to the Hugging Face hub: what can go wrong is looked for before the training."""

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from remax.config.sharing import HUB_NAME, SharingOptions
from remax.errors import UserError
from remax.untrusted import shown


class PushFailed(UserError):
    """The model could not be uploaded; it is complete in the run's folder."""


class Destination(NamedTuple):
    """Where a model is pushed to."""

    repo_id: str
    private: bool
    revision: str | None


def find_destination(options: SharingOptions, output_dir: Path) -> Destination | None:
    """Returns where --push_to_hub will push to; None without it. Nothing is made there yet.

    Raises:
        UserError: there is no token, or none that may write there; the hub cannot be reached.
    """
    if not options.push_to_hub:
        return None
    identity = _whoami()
    user, token = str(identity["name"]), identity.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError(
            f"--push_to_hub is true: the token of {user} on the hub may only read, so the model could not be pushed; "
            "log in with one that may write (hf auth login, or HF_TOKEN)."
        )
    name = options.hub_model_id or output_dir.resolve().name
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"--push_to_hub is true: the name of --output_dir, {shown(name)}, cannot be a repository's; set "
            f"--hub_model_id {user}/NAME."
        )
    namespace, _, own = name.rpartition("/")
    owners = [user, *(str(organisation.get("name")) for organisation in identity.get("orgs", []))]
    # A token for a few resources only need not show all organisations.
    if namespace and namespace not in owners and token.get("role") == "write":
        raise UserError(
            f"--hub_model_id is {name}: {user} is not in {namespace}, so the model could not be pushed; set one of "
            f"{', '.join(f'{owner}/{own}' for owner in owners)}."
        )
    return Destination(f"{namespace or user}/{own}", options.hub_private_repo, options.hub_revision)


def _whoami() -> dict[str, Any]:
    advice = "correct that, or leave --push_to_hub out and upload the model later"
    try:
        return HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UserError(
            "--push_to_hub is true: there is no token for the Hugging Face hub here, so the model could not be pushed; "
            "run hf auth login, or set the environment variable HF_TOKEN."
        ) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise UserError(
                "--push_to_hub is true: the hub does not accept the token that is set here, so the model could not be "
                "pushed; run hf auth login again, or correct HF_TOKEN."
            ) from None
        raise UserError(f"--push_to_hub is true: the hub refused ({shown(error)}); {advice}.") from error
    except Exception as error:
        raise UserError(f"--push_to_hub is true: the hub cannot be reached ({shown(error)}); {advice}.") from error


def push(model: Path, destination: Destination, *, message: str) -> str:
    """Uploads the folder of a model, with its card, and returns its address.

    Raises:
        PushFailed: it could not be; the message has the command that tries again.
    """
    repo_id, private, revision = destination
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=model,
            revision=revision,
            commit_message=message,
            ignore_patterns=_only_of_use_here(model),
        )
    except Exception as error:
        command = ["hf", "upload", repo_id, str(model), "."]
        command += ["--revision", revision] if revision else []
        command += ["--private"] if private else []
        raise PushFailed(
            f"--push_to_hub is true: the model could not be pushed ({type(error).__name__}: {shown(error, 200)}); it "
            f"is complete in {model}, try again with: {shlex.join(command)}"
        ) from error
    return str(address)


def _only_of_use_here(model: Path) -> list[str]:
    """Returns patterns of what stays: an adapter of a model that nobody else has, and peft's card of it."""
    file = model / "adapter" / "adapter_config.json"
    if not file.exists():
        return []
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    return ["adapter/*"] if not base or Path(base).exists() else ["adapter/README.md"]
