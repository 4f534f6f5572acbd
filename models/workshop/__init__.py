"""What a build machine does with models: make, shrink, look into and compare them."""
