"""Training in the data centre: data, tokenizer, first model, trainer, and the dense delta of a core update."""
