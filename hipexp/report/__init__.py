"""Reading results: tables, pictures, lists of runs, the report. Nothing here imports torch."""
