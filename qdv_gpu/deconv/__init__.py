"""Deconvnet: from a feature map back to the pixels."""
