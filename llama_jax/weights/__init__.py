"""Floor 4: reading models from files and writing them. README.md in this folder explains the package."""
