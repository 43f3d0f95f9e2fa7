"""Encoders of images: plain ViTs, and every other timm model."""
