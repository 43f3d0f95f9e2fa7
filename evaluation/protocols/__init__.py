"""One folder per protocol: `spec.py` states its facts without torch, `score.py` computes. Both files make it known."""
