"""What searches a gallery's vectors: exact search, or an index that proposes candidates, which are then decided exactly."""
