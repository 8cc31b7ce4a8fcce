"""Recover what pooling costs a trained model: it learns the answers of the model without pooling, without labels."""
