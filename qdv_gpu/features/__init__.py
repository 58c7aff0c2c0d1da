"""From images to the principal components of a layer."""
