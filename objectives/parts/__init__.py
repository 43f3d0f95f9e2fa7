"""What several objectives share, one noun a file. Not public to plug-ins."""
