"""What the training scripts share: arguments, tokenizer, batches, trainers, the life of a run, model cards."""
