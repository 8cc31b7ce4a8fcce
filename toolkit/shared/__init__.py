"""What the topics of the toolkit share: the command line, files, images, saved models, and measurements."""
