"""One run: opened, claimed, fitted, and the model that it leaves."""
