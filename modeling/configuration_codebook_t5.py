from imagedex.configuration.configuration_codebook_t5 import CodebookT5Config  # noqa: F401  (replaced by the real file on save)
