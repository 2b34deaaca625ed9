"""From a trained model and a gallery to rankings: encode, search, baselines, ranking files, contact sheets."""
