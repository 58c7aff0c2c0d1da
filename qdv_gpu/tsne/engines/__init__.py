"""What moves the points of an embedding."""
