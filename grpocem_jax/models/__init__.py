"""Language models behind one interface; the only code that imports Flax."""
