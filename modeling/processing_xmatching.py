"""XMatchingProcessor: any tokenizer and any image processor behind one call."""

from transformers import ProcessorMixin


class XMatchingProcessor(ProcessorMixin):
    """`processor(text=[...], images=[...], padding=True, return_tensors="pt")` gives what `XMatchingModel` takes.

    Args: image_processor and tokenizer, as loaded by AutoImageProcessor and AutoTokenizer.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)


XMatchingProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["XMatchingProcessor"]
