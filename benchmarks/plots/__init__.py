"""The figures of the report, each a function of the cells of a result file."""
