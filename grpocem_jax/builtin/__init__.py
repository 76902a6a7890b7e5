"""The built-in default: a tiny GPT-2 and data for five tasks, so that everything runs offline."""
