"""Floor 3: the mathematics. One value per element; no mask, no reduction, no model."""
