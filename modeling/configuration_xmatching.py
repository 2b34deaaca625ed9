from imagedex.configuration.configuration_xmatching import XMatchingConfig  # noqa: F401  (replaced by the real file on save)
