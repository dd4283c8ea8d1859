"""Model yamls, recipes, and the table of the arguments that this package adds to Ultralytics."""
