"""imagedex: find pictures from sentences. What the run_*.py scripts share; models live in ``modeling/``."""
