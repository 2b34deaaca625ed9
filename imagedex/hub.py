"""What the Hugging Face Hub answered, in words a user can act on."""

from huggingface_hub import constants, whoami
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from imagedex.errors import UserError


def hub_reason(error: BaseException, kind: str = "model") -> str | None:
    """Why the Hub did not give a repository, from the error and what caused it; None when the Hub had no part in it.

    Args: kind, what was asked for: "model" or "dataset".
    """
    from datasets.exceptions import (
        DatasetNotFoundError,
    )  # what takes long to import is not needed for a search that works

    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__

    def is_from(*types):
        return any(isinstance(cause, types) for cause in causes)

    # datasets says so in words only
    if is_from(GatedRepoError) or (isinstance(causes[0], DatasetNotFoundError) and "gated dataset" in str(causes[0])):
        return f"the {kind} is gated: ask for access on its page on the Hub, then log in with `hf auth login`"
    if is_from(RepositoryNotFoundError, DatasetNotFoundError):
        return f"no such folder here, and no such {kind} on the Hub; for a private one, log in with `hf auth login`"
    if any(isinstance(cause, HfHubHTTPError) and cause.response.status_code == 401 for cause in causes):
        return "the Hub does not accept the token in HF_TOKEN or of `hf auth login`"
    if is_from(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return f"no such folder here, not downloaded before, and {why}"
    return None


def check_push(args) -> None:
    """Before anything is read: whether the Hub knows the user. Completes `args.hub_model_id` with the owner's name.

    Args: args, the TrainingArguments. Raises `UserError`.
    """
    if not args.push_to_hub:
        return
    name = args.hub_model_id or args.output_dir.rstrip("/").rsplit("/", 1)[-1]
    if name.count("/") > 1 or name.strip("./") != name:
        raise UserError(f"--hub_model_id {name}: give owner/name")
    try:
        user = whoami()["name"]
    except Exception as error:  # noqa: BLE001  the Hub's client and its HTTP library each raise their own
        raise UserError(f"--push_to_hub cannot work: {push_reason(error)}") from error
    args.hub_model_id = name if "/" in name else f"{user}/{name}"


def push_reason(error: BaseException) -> str:
    """Why the Hub does not take a model."""
    if isinstance(error, LocalTokenNotFoundError):
        return "the Hub does not know you; log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return "the Hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN"
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return getattr(error, "server_message", None) or text
