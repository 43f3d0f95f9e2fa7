"""An objective, a backbone and an evaluation of a package of its own, which pretrain finds by their entry points."""
