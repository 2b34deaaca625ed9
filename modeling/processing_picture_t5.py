"""PictureT5Processor: T5's tokenizer and any image processor behind one call."""

from transformers import ProcessorMixin


class PictureT5Processor(ProcessorMixin):
    """`processor(text=[...], images=[...], padding=True, return_tensors="pt")` gives what `CodebookT5` and
    `VisionGroundedT5` take.

    Args: image_processor and tokenizer, as loaded by AutoImageProcessor and AutoTokenizer.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)


PictureT5Processor.register_for_auto_class("AutoProcessor")

__all__ = ["PictureT5Processor"]
