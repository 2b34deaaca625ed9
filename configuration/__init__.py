"""One configuration file a model; they travel to the Hub with the weights."""
