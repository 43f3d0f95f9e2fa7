"""Self-distillation with no labels (arXiv:2104.14294)."""
