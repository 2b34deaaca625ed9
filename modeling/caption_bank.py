"""A bank of training captions' vectors, kept with a dual encoder: it tells which pictures are near to every sentence.

Such pictures, hubs, push the right ones down, and trained pictures push new ones down. Each picture gets a bias, its mean cosine
with the captions of the bank that are nearest to it, which is taken off its scores:

    score(sentence, picture) = cosine(sentence, picture) - 1/2 mean of the k largest cosine(caption of the bank, picture)

This is half of CSLS (1710.04087), without its term for the sentence, which is the same for every picture. A bias is known before
any sentence is asked, so it costs nothing at query time (querybank normalisation, 2112.12777), and a picture's bias does not
depend on the other pictures.

With the sentence's term, too, which is computed in the same way, scores of different sentences can be compared (the whole CSLS):
this is the confidence that a picture is the right one. Below which confidence a picture is not shown is calibrated on captions
that were not trained: of such captions the share that was asked for has the right picture above it (split conformal prediction).
"""

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from torch.nn import functional as F
from transformers.utils import cached_file

from .saved_files import hub_options, replace_file

FILE = "caption_bank.safetensors"
CONFIDENCES = "right_confidences.safetensors"
_BLOCK = 2**22  # cosines held at once


class CaptionBank:
    """
    Args:
        vectors: (captions, D), of length 1; kept as float16.
        neighbours: how many captions, the nearest, make a picture's bias.
        right_confidences: (captions,) of captions that were not trained, with their own pictures; None: not calibrated.
    """

    def __init__(self, vectors: torch.Tensor, neighbours: int = 5, right_confidences: torch.Tensor | None = None):
        if vectors.ndim != 2 or len(vectors) == 0 or neighbours < 1:
            raise ValueError(f"a bank of {tuple(vectors.shape)} vectors and {neighbours} neighbours makes no bias")
        self.vectors = vectors.detach().to("cpu", torch.float16).contiguous()
        self.neighbours = min(neighbours, len(vectors))
        self.right_confidences = (
            None if right_confidences is None else right_confidences.detach().cpu().float().sort().values
        )

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def fingerprint(self) -> str:
        content = self.vectors.numpy().tobytes() + str(self.neighbours).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def bias(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """(N, D) unit vectors -> (N,) float32 biases, in units of cosine, where the vectors are."""
        # in double precision (which Apple's GPUs do not have), then rounded: equal pictures have equal biases in whatever block
        device = torch.device("cpu") if image_embeds.device.type == "mps" else image_embeds.device
        bank = F.normalize(self.vectors.to(device, torch.float64), dim=-1)
        blocks = image_embeds.to(device, torch.float64).split(max(1, _BLOCK // len(bank)))
        means = [(block @ bank.T).topk(self.neighbours, dim=1).values.mean(1) for block in blocks]
        return (torch.cat(means) / 2).float().to(image_embeds.device)

    def calibrate(self, text_embeds: torch.Tensor, image_embeds: torch.Tensor) -> None:
        """Args: (Q, D) unit vectors of captions that were not trained, and (Q, D) of each one's own picture."""
        scores = (text_embeds * image_embeds).sum(1) - self.bias(image_embeds)
        self.right_confidences = (scores - self.bias(text_embeds)).cpu().float().sort().values

    def cut_off(self, keep: float) -> float:
        """The confidence that the right picture of a new caption has with probability `keep` or more, for captions like those
        that it was calibrated on. Raises a `ValueError` for a bank that was not calibrated, and for no share between 0 and 1."""
        if not 0 < keep < 1:
            raise ValueError(f"{keep} is no share between 0 and 1")
        if self.right_confidences is None:
            raise ValueError(
                "the model was not evaluated on held-out captions when it was trained, so it has no cut-off"
            )
        place = int((len(self.right_confidences) + 1) * (1 - keep) + 1e-9)
        return self.right_confidences[place - 1].item() if place else -torch.inf

    def save_pretrained(self, folder: Path | str) -> None:
        # one entry: safetensors writes several in any order
        facts = json.dumps({"neighbours": self.neighbours, "fingerprint": self.fingerprint})
        content = safetensors.torch.save({"vectors": self.vectors}, {"bank": facts})
        replace_file(Path(folder, FILE), content)

    def save_confidences(self, folder: Path | str) -> None:
        """A file of its own: they come from an evaluation, later than the model."""
        facts = json.dumps({"bank": self.fingerprint, "confidences": hash_of(self.right_confidences)})
        content = safetensors.torch.save({"confidences": self.right_confidences}, {"facts": facts})
        replace_file(Path(folder, CONFIDENCES), content)

    def load_confidences(self, path: str | None) -> None:
        """Those of another bank, or broken ones, are as good as none."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                found, facts = file.get_tensor("confidences"), json.loads(file.metadata()["facts"])
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, AttributeError, ValueError):
            return
        if facts == {"bank": self.fingerprint, "confidences": hash_of(found)}:
            self.right_confidences = found.sort().values

    @classmethod
    def from_pretrained(cls, name_or_path: Path | str, **hub_kwargs) -> "CaptionBank | None":
        """The bank in a folder or a Hub model; None where there is none. Raises a `ValueError` for a broken one."""
        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        path = cached_file(str(name_or_path), FILE, **options, **hub_kwargs)
        if path is None:
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata, vectors = file.metadata(), file.get_tensor("vectors")
            if "bank" not in metadata:  # of an earlier version, without a fingerprint
                return cls(vectors, int(metadata["neighbours"]))
            facts = json.loads(metadata["bank"])
            bank = cls(vectors, int(facts["neighbours"]))
            if facts["fingerprint"] != bank.fingerprint:
                raise ValueError("its content has changed since it was saved")
            bank.load_confidences(cached_file(str(name_or_path), CONFIDENCES, **options, **hub_kwargs))
            return bank
        except (safetensors.SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{FILE} in {name_or_path} is broken: {error}") from error


def hash_of(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).hexdigest()


class CaptionBankMixin:
    """For a PreTrainedModel with `get_text_features` and `get_image_features`: its bank is saved and loaded with it."""

    caption_bank: CaptionBank | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers', and the bank beside the weights, where there is one."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, options = loaded[0] if isinstance(loaded, tuple) else loaded, hub_options(kwargs)
        if getattr(model.config, "_commit_hash", None):
            options["revision"] = model.config._commit_hash
        model.caption_bank = CaptionBank.from_pretrained(pretrained_model_name_or_path, **options)
        return loaded

    def save_pretrained(self, save_directory, *args, is_main_process: bool = True, **kwargs):
        """As transformers', and the bank beside the weights."""
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process and self.caption_bank is not None:
            self.caption_bank.save_pretrained(save_directory)
        elif is_main_process:  # one of other weights would be loaded with these
            Path(save_directory, FILE).unlink(missing_ok=True)

    def search_scores(self, text_embeds: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        """(Q, D) and (N, D) unit vectors -> (Q, N), what the pictures are ranked by: cosines less each picture's bias; of a model
        without a bank the cosines themselves."""
        cosines = text_embeds @ image_embeds.T
        return (
            cosines if self.caption_bank is None else cosines - self.caption_bank.bias(image_embeds).to(cosines.dtype)
        )
