"""Sentences in, pictures out, by transformers' own `pipeline`:

pipe = pipeline("text-to-image-retrieval", model=folder_or_hub_id, trust_remote_code=True)
pipe("two dogs on a beach", images=["a.jpg", "b.jpg"], top_k=1)  # of a dual encoder
[{"image": "b.jpg", "index": 1, "score": 0.31}]
pipe("two dogs on a beach", top_k=1)  # a model that writes identifiers names the pictures that it learned
[{"image_id": "b.jpg", "score": -0.42}]
"""

import hashlib
import os
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import Pipeline

from .picture_reading import as_rgb

TASK = "text-to-image-retrieval"
TOP_K = 10
PICTURES_AT_ONCE = 32  # encoded together, where the pipeline was given no batch_size


class TextToImageRetrievalPipeline(Pipeline):
    """
    Keywords of the pipeline and of each call, beside transformers' own (batch_size, ...):
        images: of a dual encoder the pictures that can be found: Pillow's or paths. They are encoded once, and are kept: later
            calls need not give them again.
        image_embeds: (N, D) vectors that `get_image_features` gave before (`encode_images`), so that nothing is encoded.
        top_k: how many pictures to find, 10 by default; fewer where there are fewer.
        num_beams: of a model that writes identifiers; by default 10, or top_k where that is more.

    Returns for each sentence a list, best first: a dual encoder's `index` among the pictures, the picture as it was given
    (`image`) and its `score`, a cosine less the picture's bias where the model has kept a caption bank; of a model that writes
    identifiers `image_id` and `score`, the identifier's log-probability in nats.

    Raises: a `ValueError` for keywords that the model cannot heed, and for a dual encoder without pictures.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = _load_video_processor = False

    images: list | None = None
    image_embeds: torch.Tensor | None = None  # (N, D) float32, of length 1
    bias: torch.Tensor | None = None  # (N,)
    encoded: dict | None = None  # what a picture is known by -> its vector

    @property
    def writes_identifiers(self) -> bool:
        return hasattr(self.model, "retrieve")

    def _sanitize_parameters(self, images=None, image_embeds=None, top_k=None, num_beams=None):
        if images is not None or image_embeds is not None:
            if self.writes_identifiers:
                raise ValueError("this model names the pictures that it learned; leave images and image_embeds out")
            self.set_pictures(images, image_embeds)
        if num_beams is not None and not self.writes_identifiers:
            raise ValueError("num_beams is for models that write identifiers; leave it out")
        for name, value in (("top_k", top_k), ("num_beams", num_beams)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        given = {"top_k": top_k, "num_beams": num_beams}
        return {}, {name: value for name, value in given.items() if value is not None}, {}

    def set_pictures(self, images=None, image_embeds=None) -> None:
        """From here on these pictures are found."""
        one = isinstance(images, str | Path | Image.Image)
        images = [images] if one else None if images is None else list(images)
        if image_embeds is None:
            image_embeds = self.encode_images(images)
        else:
            image_embeds = F.normalize(torch.as_tensor(image_embeds).float().cpu(), dim=-1)
        if len(image_embeds) == 0 or (images is not None and len(images) != len(image_embeds)):
            count = "no" if images is None else len(images)
            raise ValueError(f"{count} images and {len(image_embeds)} vectors of pictures: give as many, one or more")
        bank = getattr(self.model, "caption_bank", None)
        self.images, self.image_embeds = images, image_embeds
        self.bias = None if bank is None else bank.bias(image_embeds)

    def encode_images(self, images) -> torch.Tensor:
        """Pictures (N) -> (N, D) float32 vectors of length 1; those of the call before are not encoded again."""
        names = [picture_name(picture) for picture in images]
        known = {name: self.encoded[name] for name in names if name in self.encoded} if self.encoded else {}
        new = list({name: picture for name, picture in zip(names, images, strict=True) if name not in known}.items())
        size = self._batch_size or PICTURES_AT_ONCE
        for start in range(0, len(new), size):
            batch = new[start : start + size]
            inputs = self.processor(images=[picture for _, picture in batch], return_tensors="pt")
            inputs = {name: v.to(self.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
            with torch.no_grad():
                inputs = self.ensure_tensor_on_device(**inputs)
                vectors = self.model.get_image_features(**inputs).pooler_output.float().cpu()
            known |= zip((name for name, _ in batch), vectors, strict=True)
        self.encoded = known
        return torch.stack([known[name] for name in names]) if names else torch.empty(0, 0)

    def __call__(self, inputs, **kwargs):
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def preprocess(self, sentence: str) -> dict:
        if not isinstance(sentence, str):
            raise ValueError(f"a sentence is wanted, not {type(sentence).__name__}")
        return {"sentence": sentence}

    def _forward(self, inputs: dict, top_k: int = TOP_K, num_beams: int | None = None) -> dict:
        sentences = inputs["sentence"]
        sentences = [sentences] if isinstance(sentences, str) else sentences
        if self.writes_identifiers:
            self.model.processor = self.model.processor or self.processor
            return {"found": self.model.retrieve(sentences, num_beams=num_beams or max(TOP_K, top_k), k=top_k)}
        if self.image_embeds is None:
            raise ValueError("which pictures? Give images=[...], or their vectors as image_embeds")
        written = self.ensure_tensor_on_device(**self.processor(text=sentences, return_tensors="pt"))
        scores = self.model.get_text_features(**written).pooler_output.float().cpu() @ self.image_embeds.T
        scores = scores if self.bias is None else scores - self.bias
        ordered = scores.sort(dim=1, descending=True, stable=True)  # equal ones stay in the pictures' order
        best = ordered.indices[:, :top_k].tolist(), ordered.values[:, :top_k].tolist()
        return {"found": [list(zip(rows, own, strict=True)) for rows, own in zip(*best, strict=True)]}

    def postprocess(self, outputs: dict) -> list[dict]:
        found = outputs["found"]
        if found and isinstance(found[0], list):  # a batch of one, which transformers does not take apart
            (found,) = found
        if self.writes_identifiers:
            return [{"image_id": image_id, "score": score} for image_id, score in found]
        shown = [{} if self.images is None else {"image": self.images[row]} for row, _ in found]
        return [picture | {"index": row, "score": score} for picture, (row, score) in zip(shown, found, strict=True)]

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Model and processor; of a model that writes identifiers these, too."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)
        if self.writes_identifiers:
            (self.model.identifiers or self.model.load_identifiers()).save_pretrained(save_directory)


def picture_name(picture) -> tuple:
    """What has the same name has the same vector: of a file its path, size and time, of a picture its pixels."""
    if isinstance(picture, str | Path) and os.path.isfile(picture):
        state = os.stat(picture)
        return os.path.abspath(picture), state.st_size, state.st_mtime_ns
    shown = as_rgb(picture)
    return hashlib.blake2b(shown.tobytes()).digest(), shown.size


class RetrievalPipelineMixin:
    """For a PreTrainedModel: its config names the pipeline, whose file is saved beside it, since the model's file imports it."""

    def save_pretrained(self, *args, **kwargs):
        """As transformers'."""
        module = TextToImageRetrievalPipeline.__module__.split(".")[-1]
        implementation = f"{module}.{TextToImageRetrievalPipeline.__name__}"
        self.config.custom_pipelines = {TASK: {"impl": implementation, "pt": ["AutoModel"]}}
        return super().save_pretrained(*args, **kwargs)
