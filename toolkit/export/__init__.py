"""Export a trained model to ONNX or torch.export, quantise it to int8, and check and measure the result."""
