"""What a user asks for: settings in, files out."""
