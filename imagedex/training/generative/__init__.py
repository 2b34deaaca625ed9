"""Training of models that write identifiers: T5, CodebookT5, VisionGroundedT5."""
