"""Labelled images: what the networks are shown."""
