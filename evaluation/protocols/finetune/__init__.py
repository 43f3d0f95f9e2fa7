"""The whole encoder trained with a linear layer on top."""
