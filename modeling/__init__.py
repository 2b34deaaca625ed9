"""One modeling file a model, its processor and its losses; they travel to the Hub with the weights.

Inside this repository the Auto classes find them by `model_type`, so a folder we saved loads without asking whether to run
the copy of this code that it carries.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor

from configuration.configuration_codebook_t5 import CodebookT5Config
from configuration.configuration_vision_grounded_t5 import VisionGroundedT5Config
from configuration.configuration_xmatching import XMatchingConfig
from modeling.modeling_codebook_t5 import CodebookT5
from modeling.modeling_vision_grounded_t5 import VisionGroundedT5
from modeling.modeling_xmatching import XMatchingModel
from modeling.processing_picture_t5 import PictureT5Processor
from modeling.processing_xmatching import XMatchingProcessor

for config, model, processor in (
    (XMatchingConfig, XMatchingModel, XMatchingProcessor),
    (CodebookT5Config, CodebookT5, PictureT5Processor),
    (VisionGroundedT5Config, VisionGroundedT5, PictureT5Processor),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoProcessor.register(config, processor, exist_ok=True)
for config, model in ((CodebookT5Config, CodebookT5), (VisionGroundedT5Config, VisionGroundedT5)):
    AutoModelForSeq2SeqLM.register(config, model, exist_ok=True)
