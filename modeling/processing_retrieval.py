"""How a picture and a sentence become tensors: the processor that every model here brings along."""

from collections.abc import Sequence

from transformers import AutoImageProcessor, ProcessorMixin

from .picture_reading import as_rgb

_TO_BLANKS = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


def clean(text: str) -> str:
    """Lower case, blanks for `.!"()*#:;~`, single spaces; commas, hyphens, apostrophes and the like stay (as BLIP, 2201.12086,
    and the DSI for pictures after it read captions)."""
    return " ".join(text.lower().translate(_TO_BLANKS).split())


class SentenceProcessor(ProcessorMixin):
    """Sentences to tokens, written as the model was trained to read them: the processor of a model without pictures (T5).

    `processor(text=["a dog", "two birds on a wire"], return_tensors="pt")` gives `input_ids` and `attention_mask` (B, T),
    padded to the longest and cut to `max_text_length`; with `padding="max_length"` the `input_ids` alone.

    Args:
        tokenizer: as loaded by AutoTokenizer.
        prompt: written before each sentence.
        clean_text: sentences in lower case and with blanks for some punctuation, see `clean`.
        max_text_length: of a sentence in tokens, prompt and end included; longer ones are cut. None: what the tokenizer allows.
        padding: "longest" of the batch, or "max_length" for a tower that was trained on sentences padded to `max_text_length`
            without a mask (SigLIP) and would give other vectors for others.
    """

    def __init__(
        self, tokenizer=None, prompt: str = "", clean_text: bool = False, max_text_length: int | None = None,
        padding: str = "longest", **kwargs,
    ):  # fmt: skip
        super().__init__(tokenizer, **kwargs)
        self.prompt, self.clean_text, self.max_text_length, self.padding = prompt, clean_text, max_text_length, padding

    def cleaned(self, sentence: str) -> str:
        return clean(sentence) if self.clean_text else sentence

    def written(self, sentence: str) -> str:
        """The sentence as the tokenizer gets it."""
        return self.prompt + self.cleaned(sentence)

    @property
    def text_options(self) -> dict:
        """Of the tokenizer call."""
        limit = self.max_text_length
        return {"truncation": True, "max_length": limit} if limit else {"truncation": False}

    def padded(self, rows: list[dict]) -> dict:
        """Token lists of B sentences -> the model's inputs (B, T)."""
        options = {
            "padding": self.padding,
            "max_length": self.max_text_length if self.padding == "max_length" else None,
        }
        return self.unmasked(self.tokenizer.pad(rows, return_tensors="pt", **options))

    def unmasked(self, inputs):
        """Without the mask, where the tower is to see the padding."""
        if self.padding == "max_length":
            inputs.pop("attention_mask", None)
        return inputs

    @classmethod
    def from_pretrained(cls, *args, trust_remote_code: bool = False, **kwargs):
        """As ProcessorMixin's; code that lies beside is run at the caller's word alone, and nobody is asked for it."""
        return super().from_pretrained(*args, trust_remote_code=trust_remote_code, **kwargs)

    def tokens(self, sentences: Sequence[str]) -> tuple[dict[str, list], list[bool]]:
        """Token lists without padding, by name; and which sentences were cut."""
        texts = [self.written(sentence) for sentence in sentences]
        encoded = dict(self.tokenizer(texts, truncation=False, verbose=False))
        limit = self.max_text_length
        cut = [limit is not None and len(ids) > limit for ids in encoded["input_ids"]]
        rows = [row for row, is_cut in enumerate(cut) if is_cut]
        if rows:
            shorter = self.tokenizer([texts[row] for row in rows], truncation=True, max_length=limit)
            for name, values in shorter.items():
                for row, value in zip(rows, values, strict=True):
                    encoded[name][row] = value
        return encoded, cut

    def __call__(self, images=None, text=None, **kwargs):
        """As every processor of transformers; sentences are written, padded and cut unless told otherwise."""
        if text is not None:
            text = self.written(text) if isinstance(text, str) else [self.written(sentence) for sentence in text]
            nested = dict(kwargs.get("text_kwargs") or {})
            defaults = {"padding": True} | self.text_options
            kwargs["text_kwargs"] = {k: v for k, v in defaults.items() if k not in kwargs} | nested
            for options in (kwargs, kwargs["text_kwargs"]):
                if options.get("padding") is True:  # as this processor pads
                    options["padding"] = self.padding
        inputs = super().__call__(images=images, text=text, **kwargs)
        return inputs if text is None else self.unmasked(inputs)


class RetrievalProcessor(SentenceProcessor):
    """Sentences to tokens and pictures to pixels, for `XMatchingModel`, `CodebookT5` and `VisionGroundedT5`.

    `processor(text=["a dog"], images=[picture, "b.jpg"], return_tensors="pt")` gives `pixel_values` (B, 3, height, width) too.
    Pictures are Pillow's or paths; they are read upright and as RGB (`as_rgb`), then go through the tower's own processor.

    Args: image_processor, as loaded by AutoImageProcessor; the others as in `SentenceProcessor`.
    """

    def __init__(
        self, image_processor=None, tokenizer=None, prompt: str = "", clean_text: bool = False,
        max_text_length: int | None = None, padding: str = "longest", **kwargs,
    ):  # fmt: skip
        ProcessorMixin.__init__(self, image_processor, tokenizer, **kwargs)
        self.prompt, self.clean_text, self.max_text_length, self.padding = prompt, clean_text, max_text_length, padding

    def __call__(self, images=None, text=None, **kwargs):
        if images is not None:
            images = [as_rgb(picture) for picture in images] if isinstance(images, list | tuple) else as_rgb(images)
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """As ProcessorMixin's, with two differences: pictures are resized by Pillow on every machine, whether or not
        torchvision is there, so that a picture has one vector; and timm's processor, which saves nothing, is made anew."""
        saved = (processor_dict or {}).get("image_processor") or {}
        if saved.get("image_processor_type") == "TimmWrapperImageProcessor":
            image_processor = timm_processor(saved)
        else:
            options = {**kwargs, "backend": "pil"}
            image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **options)
        subfolder = kwargs.pop("subfolder", "")
        tokenizer = cls._load_tokenizer_from_pretrained(
            "tokenizer", pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        return [image_processor, tokenizer]


def timm_processor(saved: dict):
    """timm's image processor from what `to_dict` says of it. Raises `ImportError` where timm or torchvision is missing."""
    from transformers import TimmWrapperImageProcessor

    return TimmWrapperImageProcessor(pretrained_cfg=saved["data_config"], architecture=saved.get("architecture"))


SentenceProcessor.register_for_auto_class("AutoProcessor")
RetrievalProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["RetrievalProcessor", "SentenceProcessor"]
