"""The dual encoder of a gallery: loaded when it is first needed, and known again without a look at its weights."""

import functools
from pathlib import Path

import torch

from imagedex.checkpoints import choose_device, source_of
from imagedex.encoding.dual_encoder import DualEncoder, load_dual_encoder
from imagedex.encoding.store import weights_fingerprint
from imagedex.gallery.catalog import Header, files_of

DEFAULT_MODEL = "google/siglip2-base-patch16-224"


class GalleryModel:
    """
    Args:
        name: folder or Hub id. device: None: the best there is.
        header: of the gallery's catalog; None where there is none yet.
    """

    def __init__(self, name: str, device=None, trust_remote_code: bool = False, header: Header | None = None):
        self.name, self.device, self.trust_remote_code, self.header = name, device, trust_remote_code, header

    @functools.cached_property
    def encoder(self) -> DualEncoder:
        """On its device; on an NVIDIA GPU in bf16. Raises `UserError`."""
        device = choose_device(self.device)
        encoder = load_dual_encoder(self.name, self.trust_remote_code, device)
        if device.type == "cuda" and torch.cuda.is_bf16_supported():
            encoder.model.to(torch.bfloat16)
        return encoder

    @functools.cached_property
    def files(self) -> list:
        folder = Path(source_of(self.name))
        if not folder.is_dir():  # a Hub model, which is in the cache by now
            from transformers.utils import cached_file

            folder = Path(cached_file(self.name, "config.json")).parent
        return files_of(str(folder))

    @functools.cached_property
    def maker(self) -> dict[str, str]:
        """Fingerprints of the weights and of the bank against hubs; those of the catalog while the model's files are the same."""
        if self.header and self.header.model == self.name and self.header.files == self.files:
            return self.header.maker
        model, bank = self.encoder.model, self.encoder.bank
        fingerprint = weights_fingerprint(model, self.encoder.image_processor.to_dict())
        return {"model": fingerprint, "bank": bank.fingerprint if bank else ""}
