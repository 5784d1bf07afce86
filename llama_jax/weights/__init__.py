"""Floor 4: models in and out of files. README.md in this folder explains the package."""
