"""What is checked of a folder by itself: small files and headers only, but for the checksums."""
