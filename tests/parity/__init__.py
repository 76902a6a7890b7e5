"""Reference numbers from PyTorch and transformers, and what makes them reproducible."""
