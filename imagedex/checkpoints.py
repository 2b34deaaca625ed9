"""A saved model, by folder or Hub id: which kind it is, and what is wrong with it, said in one line."""

import json
import os
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from imagedex.errors import UserError
from imagedex.hub import hub_reason

MODEL_FLAG = "model_name_or_path"
# files of a saved model that hold one JSON object
OBJECTS = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "processor_config.json", "preprocessor_config.json", "generation_config.json", "adapter_config.json", "identifiers.json",
    "model.safetensors.index.json",
)  # fmt: skip


@contextmanager
def loading(what: str):
    """Whatever somebody else's files make fail in the block is said of `what`, in one line: no list of kinds is whole."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot load {what}: {why_not(error)}") from error


def check_files(folder: Path, shown: str) -> None:
    """Whether the files of a saved model can be read at all; what they say is for those who load them. Raises `UserError`.

    Args: shown, how the model was named, for messages.
    """
    for name in OBJECTS:
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"{shown}: its {name} is broken ({one_line(error)}); save the model again") from error
            if not isinstance(found, dict):
                raise UserError(f"{shown}: its {name} is broken (it holds no JSON object); save the model again")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(path, "pt")  # reads the header, which knows how long the file is
        except Exception as error:  # the library's own, or the operating system's
            raise UserError(f"{shown}: its {path.name} is broken ({one_line(error)}); save the model again") from error


def read_model_type(name_or_path: str, flag: str = MODEL_FLAG) -> str:
    """The `model_type` of a folder's or Hub id's config.json, without loading the model.

    Args: flag, which argument named it, for messages.

    Raises:
        UserError: no such folder or Hub model, or no config.json in it.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"--{flag} {name_or_path} has no config.json, so it is not a saved model")
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if not folder.is_dir() and (looks_like_path or folder.exists()):
        raise UserError(f"--{flag} {name_or_path} is not a folder; give a model's folder or its Hub id")
    if folder.is_dir():
        check_files(folder, f"--{flag} {name_or_path}")
    with loading(f"--{flag} {name_or_path}"):
        config, _ = PreTrainedConfig.get_config_dict(source_of(name_or_path))
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"--{flag} {name_or_path}: its config.json names no model_type")
    return config["model_type"]


def from_hub(loader, name: str, argument: str, **kwargs):
    """`loader(name)`; a name that cannot be loaded is the user's mistake, said with the argument it came from. Code that it
    brings is not run, and nobody is asked whether it should be."""
    if os.sep in name and not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--{argument} {name}: there is no such folder")
    if os.path.isdir(name):
        check_files(Path(name), f"--{argument} {name}")
    with loading(f"--{argument} {name}"):
        return loader(name, **{"trust_remote_code": False} | kwargs)


def take_style(identifiers) -> dict:
    """How sentences are written for a model of imagedex 0.1, which kept that beside its identifiers; {} for a later one. It
    belongs to the processor now, so it is taken away from the identifiers."""
    kept = identifiers.source.pop("queries", None)
    names = {"prompt": "prompt", "clean_text": "cleans", "max_text_length": "max_length"}
    return {ours: kept[theirs] for ours, theirs in names.items() if theirs in kept} if kept else {}


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best one there is. Raises `UserError` when it is not there."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here: {one_line(error)}") from error
    return device


def source_of(name_or_path: str) -> str:
    """What from_pretrained is to be given: the folder, if it is one."""
    folder = Path(name_or_path).expanduser()
    return str(folder) if folder.is_dir() else name_or_path


def dtype_on(device):
    return torch.float32 if torch.device(device).type == "cpu" else "auto"


def why_not(error: BaseException) -> str:
    """Why a model cannot be loaded, in one line."""
    reason = hub_reason(error) or one_line(error)
    if isinstance(error, KeyError | TypeError | AttributeError | IndexError | AssertionError):
        reason = f"its files do not fit each other ({type(error).__name__}: {reason})"
    if isinstance(error, pickle.UnpicklingError):
        reason = (
            "its weights are a pickle with more than tensors in it, which could run anything; save them as safetensors"
        )
    elif "trust_remote_code" in str(error):
        reason += "; pass --trust_remote_code to run the code it brings"
    elif "ignore_mismatched_sizes" in str(error):
        reason = "its weights have other shapes than its config.json says"
    return reason


def require_whole(report: dict, model_type: str, shown: str) -> None:
    """transformers only warns of missing weights and draws them at random, which would give figures that mean nothing."""
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise UserError(
            f"{shown} lacks {len(lacking)} weights of its {model_type} model, the first is {lacking[0]}; it is the "
            "checkpoint of another model, or not a whole one"
        )


def is_empty_tokenizer(tokenizer) -> bool:
    """Where a folder has no tokenizer files, transformers 5 makes an empty tokenizer of the model's class, silently."""
    return tokenizer is None or len(tokenizer) <= len(set(tokenizer.all_special_ids))


def check_tokenizer(tokenizer, shown: str) -> None:
    """Raises `UserError` for a tokenizer that cannot make a batch. Args: shown, what brings it."""
    if is_empty_tokenizer(tokenizer):
        raise UserError(f"{shown} brings no tokenizer; save the one it was trained with beside it")
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{shown} brings a tokenizer without a padding token: its tokenizer_config.json is missing or another's"
        )


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first paragraph of an error's message on one line."""
    text = " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
