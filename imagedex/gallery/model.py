"""The dual encoder of a gallery: loaded when it is first needed, and known again without a look at its weights."""

import functools
import hashlib
import os
from pathlib import Path

import torch

from imagedex.checkpoints import choose_device, source_of
from imagedex.encoding.dual_encoder import DualEncoder, load_dual_encoder
from imagedex.gallery.catalog import Header, files_of
from imagedex.modeling.caption_bank import CONFIDENCES
from imagedex.modeling.caption_bank import FILE as CAPTION_BANK

WEIGHTS = (".safetensors", ".bin")
OF_THE_BANK = (CAPTION_BANK, CONFIDENCES)  # which has a fingerprint of its own
CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
DEFAULT_MODEL = "google/siglip2-base-patch16-224"


class GalleryModel:
    """
    Args:
        name: folder or Hub id. device: None: the best there is.
        header: of the gallery's catalog; None where there is none yet.
    """

    def __init__(self, name: str, device=None, trust_remote_code: bool = False, header: Header | None = None):
        self.name = os.path.abspath(source_of(name)) if os.path.isdir(source_of(name)) else name
        self.device, self.trust_remote_code, self.header = device, trust_remote_code, header

    @functools.cached_property
    def encoder(self) -> DualEncoder:
        """On its device; on an NVIDIA GPU in bf16. Raises `UserError`."""
        device = choose_device(self.device)
        encoder = load_dual_encoder(self.name, self.trust_remote_code, device)
        if device.type == "cuda" and torch.cuda.is_bf16_supported():
            encoder.model.to(torch.bfloat16)
        return encoder

    @functools.cached_property
    def folder(self) -> Path:
        """Where its files lie; of a Hub model in the cache, once it is loaded."""
        folder = Path(source_of(self.name))
        if folder.is_dir():
            return folder
        from transformers.utils import cached_file

        self.encoder  # noqa: B018  downloads it
        return Path(cached_file(self.name, "config.json")).parent

    @functools.cached_property
    def files(self) -> list:
        return files_of(str(self.folder))

    @functools.cached_property
    def maker(self) -> dict[str, str]:
        """Fingerprints of the model and of its bank against hubs, by the content of its files, so that they are the same on every
        device; those of the catalog while the files have the same sizes and times."""
        if self.header and self.header.model == self.name and self.header.files == self.files:
            return self.header.maker
        bank, digest = self.encoder.bank, hashlib.blake2b(digest_size=16)
        for name, _, _ in self.files:
            if name.endswith(WEIGHTS) and name not in OF_THE_BANK or name in CONFIGS:
                with open(self.folder / name, "rb") as file:
                    content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
                digest.update(name.encode() + content)
        return {"model": digest.hexdigest(), "bank": bank.fingerprint if bank else ""}
