"""One modeling file a model, its processor and its losses; they travel to the Hub with the weights.

Inside this repository the Auto classes find them by `model_type`, so a folder we saved loads without asking whether to run
the copy of this code that it carries.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, T5ForConditionalGeneration

from .configuration_codebook_t5 import CodebookT5Config
from .configuration_vision_grounded_t5 import VisionGroundedT5Config
from .configuration_xmatching import XMatchingConfig
from .modeling_codebook_t5 import CodebookT5
from .modeling_vision_grounded_t5 import VisionGroundedT5
from .modeling_xmatching import XMatchingModel
from .processing_retrieval import RetrievalProcessor

for config, model in (
    (XMatchingConfig, XMatchingModel),
    (CodebookT5Config, CodebookT5),
    (VisionGroundedT5Config, VisionGroundedT5),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoProcessor.register(config, RetrievalProcessor, exist_ok=True)
for config, model in ((CodebookT5Config, CodebookT5), (VisionGroundedT5Config, VisionGroundedT5)):
    AutoModelForSeq2SeqLM.register(config, model, exist_ok=True)

# models that write identifiers
GENERATIVE = {"t5": T5ForConditionalGeneration, "codebook_t5": CodebookT5, "vision_grounded_t5": VisionGroundedT5}
