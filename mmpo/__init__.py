"""mmpo: one preference-alignment suite for text, image, video and audio models."""

__version__ = "0.1.0"
