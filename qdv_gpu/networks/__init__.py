"""Networks: what they are, how they are named and loaded, and where their layers are."""
