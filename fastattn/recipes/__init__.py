"""What is done with the models: data, training, fine-tuning, generation, evaluation. The commands of `fastattn` only print."""
