"""One modeling file a model, its processor and its losses; they travel to the Hub with the weights."""
