"""Dense tasks: semantic segmentation from images and masks, and HPool-ViT's trunk in the heads of Transformers."""
