"""Shows what an HPool-ViT does and costs: the commands `visualize` and `stats`."""
