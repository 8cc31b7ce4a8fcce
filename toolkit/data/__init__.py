"""Images for training and validation: where they are, how they are read, and the batches that they make."""
