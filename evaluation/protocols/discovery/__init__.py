"""Objects found without labels, by a normalized cut of the patches of each image."""
