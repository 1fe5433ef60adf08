"""Curation of web-scale image and image-text data. Importing it loads neither torch nor ray."""

__version__ = "0.1.0"
