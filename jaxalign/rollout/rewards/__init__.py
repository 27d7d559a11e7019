"""Scores of responses: functions, reward models, weighted sums."""
