"""One modeling file a model, its processor and its losses; they travel to the Hub with the weights.

Inside this repository the Auto classes find them by `model_type`, so a folder we saved loads without asking whether to run
the copy of this code that it carries.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from configuration.configuration_xmatching import XMatchingConfig
from modeling.modeling_xmatching import XMatchingModel
from modeling.processing_xmatching import XMatchingProcessor

AutoConfig.register("xmatching", XMatchingConfig, exist_ok=True)
AutoModel.register(XMatchingConfig, XMatchingModel, exist_ok=True)
AutoProcessor.register(XMatchingConfig, XMatchingProcessor, exist_ok=True)
