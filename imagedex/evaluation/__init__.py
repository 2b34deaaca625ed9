"""How good a ranking is: exact ranks, what a model has to beat, and the one printer of tables."""
