"""Numbers for maps: neighborhood hit and how sure it is."""
