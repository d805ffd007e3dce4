"""Text line recognition with a CRNN: data, networks, training, evaluation, checkpoints."""
