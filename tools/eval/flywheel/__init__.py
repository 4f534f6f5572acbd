"""`skerry eval flywheel`: what devices learn from the help they get, and how much less they ask for it later."""
