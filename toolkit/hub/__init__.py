"""
Share a model on the Hugging Face Hub: the model card, the complete repository in a folder, and the upload
(`hpool-vit push`).
"""
