"""A page that shows HPool-ViTs at work, in your browser or as a Hugging Face Space (`hpool-vit demo`)."""
