"""What `skerry doctor` looks at: one module per subject, each check a function that gives findings."""
