from imagedex.configuration.configuration_vision_grounded_t5 import VisionGroundedT5Config  # noqa: F401  (replaced by the real file on save)
