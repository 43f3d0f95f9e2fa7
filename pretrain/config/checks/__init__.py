"""What settings mean together, one subject a file; `resolve` asks them all."""
