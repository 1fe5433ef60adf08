"""Images and texts are measured; nothing is dropped here."""
