"""The README.md of artifacts: rendered from templates with the real numbers, and merged with what a person wrote."""
