"""Training of the bundled demo model; not part of the package (see README.md here)."""
