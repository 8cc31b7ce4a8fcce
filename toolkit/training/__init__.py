"""Training and fine-tuning: the command `hpool-vit train`, and the recipes, metrics and checkpoints behind it."""
