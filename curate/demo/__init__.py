"""A small web, drawn and served by the project itself, with known truth."""
