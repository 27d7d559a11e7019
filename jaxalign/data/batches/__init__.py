"""Rows, groups of responses and their packing: batches as a function of the step."""
