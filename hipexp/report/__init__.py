"""Reading results: tables, pictures, lists of runs. Nothing here imports torch."""
