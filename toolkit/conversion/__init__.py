"""Turns a trained ViT, or a checkpoint of the paper's training code, into an HPool-ViT: the command `convert`."""
