"""The sections of the report: each function reads the result files that are there and says what they show."""
